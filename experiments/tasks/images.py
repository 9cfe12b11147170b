"""Classification of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.data import images
from experiments.errors import ExperimentError
from experiments.tasks.task import Sums, Task
from models.vision import PyramidTransformer, VisionTransformer
from models.vision_config import (
    PyramidConfig,
    ViTConfig,
)


def classification_sums(
    logits: Float[Array, "B classes"],
    labels: Int[Array, " B"],
    weights: Float[Array, " B"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Sums, Float[Array, ""]]:
    """Returns sums over images of cross entropy in nats and of right answers, and how many count.

    Args:
      logits: of the model.
      labels: the right classes.
      weights: 1 for images that count, 0 for those that fill up a batch; None: all count.
      label_smoothing: part of the target that all classes share; of the loss only.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = jnp.ones(labels.shape, logits.dtype) if weights is None else weights
    targets = optax.smooth_labels(
        (labels[:, None] == jnp.arange(logits.shape[1])).astype(logits.dtype), label_smoothing
    )
    losses = optax.softmax_cross_entropy(logits, targets)
    right = jnp.argmax(logits, axis=1) == labels
    return {"loss": (losses * weights).sum(), "accuracy": (right * weights).sum()}, weights.sum()


class ImagesTask(Task):
    """Classification, measured in the share of images whose class is the model's first choice.

    A configuration has `model` (`ViTConfig` or `PyramidConfig`), `data` (`ImageDataConfig`),
    `batch_size` and `seed`.
    """

    what = "classes of images"
    metric = "accuracy"
    metric_label = "accuracy"
    targets = "images"
    metric_range = (0, 1)

    def make_model(self, model: ViTConfig | PyramidConfig, rngs: nnx.Rngs) -> nnx.Module:
        """A vision transformer, of one stage or several."""
        kind = PyramidTransformer if isinstance(model, PyramidConfig) else VisionTransformer
        return kind(model, rngs=rngs)

    def sums(self, model: nnx.Module, batch: dict[str, Array]) -> tuple[Sums, Float[Array, ""]]:
        """Cross entropy in nats and right answers."""
        return classification_sums(model(batch["images"]), batch["labels"], batch.get("weights"))

    def check(self, config: Any) -> None:
        """Refuses images of another size than the model's."""
        if config.model.image_size != config.data.image_size:
            raise ExperimentError(
                f"data.image_size: {config.data.image_size}, but model.image_size is "
                f"{config.model.image_size}"
            )

    def train_dataset(
        self, config: Any, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Shuffled images of the training split, moved and mirrored."""
        return images.train_dataset(
            config.data,
            batch_size=batch_size,
            seed=config.seed,
            channels=config.model.channels,
            num_classes=config.model.num_classes,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation_batches(self, config: Any, split: str) -> Iterator[dict[str, np.ndarray]]:
        """Each image once."""
        data = config.data
        return images.evaluation_batches(
            data,
            data.validation_split if split == "validation" else data.test_split,
            batch_size=config.batch_size,
            channels=config.model.channels,
            num_classes=config.model.num_classes,
        )

    def units(self, config: Any) -> tuple[int, str]:
        """Tokens are patches."""
        rows, size = config.batch_size, config.data.image_size
        patches = rows * config.model.num_tokens
        return patches, f"{rows} images of {config.data.name}, {size} x {size}"
