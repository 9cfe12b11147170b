"""What a model can be trained to do: each task has its data, its loss and its measures."""

from __future__ import annotations

from types import MappingProxyType

from experiments.config import RunConfig, task_of
from experiments.tasks.images import ImagesTask
from experiments.tasks.mqar import MqarTask
from experiments.tasks.needle import NeedleTask
from experiments.tasks.series import SeriesTask
from experiments.tasks.task import Means, Sums, Task
from experiments.tasks.text import TextTask

__all__ = ["TASKS", "Means", "Sums", "Task", "of"]

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {
        "text": TextTask(),
        "mqar": MqarTask(),
        "needle": NeedleTask(),
        "images": ImagesTask(),
        "series": SeriesTask(),
    }
)


def of(config: RunConfig) -> Task:
    """The task that a configuration is of."""
    return TASKS[task_of(config)]
