"""Multi-query associative recall (MQAR)."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.config import MqarConfig
from experiments.data import mqar
from experiments.data.made import ENDLESS, padded_batches, train_batches
from experiments.errors import ExperimentError
from experiments.tasks.task import Sums, Task
from models.language import DecoderConfig, DecoderLM


class MqarTask(Task):
    """Recall of values by their keys, measured in the share of queries answered right."""

    what = "multi-query associative recall: values by their keys"
    metric = "accuracy"
    metric_label = "accuracy"
    targets = "queries"
    metric_range = (0, 1)

    def make_model(self, model: DecoderConfig, rngs: nnx.Rngs) -> DecoderLM:
        """A decoder."""
        return DecoderLM(model, rngs=rngs)

    def sums(self, model: DecoderLM, batch: dict[str, Array]) -> tuple[Sums, Float[Array, ""]]:
        """Cross entropy in nats and right answers, at the queries."""
        logits, targets, weights = model(batch["tokens"]), batch["targets"], batch["weights"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = (jnp.argmax(logits, -1) == targets) * weights
        return {"loss": (losses * weights).sum(), "accuracy": right.sum()}, weights.sum()

    def check(self, config: MqarConfig) -> None:
        """Refuses a model that lacks some of the data's tokens."""
        if config.model.vocab_size < config.data.vocab_size:
            raise ExperimentError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than data.vocab_size, "
                f"{config.data.vocab_size}"
            )

    def train_dataset(
        self, config: MqarConfig, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Ever new sequences."""
        examples = mqar.MqarExamples(config.data, "train", seed=config.seed, count=ENDLESS)
        return train_batches(
            examples,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation_batches(
        self, config: MqarConfig, split: str, length: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The same sequences in every run, of the configuration's length or of another."""
        count = config.data.evaluate_examples
        examples = mqar.MqarExamples(config.data, split, seed=0, count=count, length=length)
        return padded_batches(examples, config.batch_size)

    def test_data(
        self, config: MqarConfig, max_bytes: int | None = None
    ) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """Sequences of the length that was trained, then of `data.evaluate_lengths`."""
        del max_bytes
        found = {"": self.evaluation_batches(config, "test")}
        for length in config.data.evaluate_lengths:
            found[f"{length} tokens"] = self.evaluation_batches(config, "test", length)
        return found

    def units(self, config: MqarConfig) -> tuple[int, str]:
        """Tokens are those of all sequences."""
        rows, data = config.batch_size, config.data
        return rows * data.length, f"{rows} x {data.length} tokens with {data.pairs} pairs"
