"""Language modelling: text, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grain
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.baselines import ByteModel, lzma_bits
from experiments.config import TextConfig
from experiments.data import text
from experiments.errors import ExperimentError
from experiments.tasks.task import Means, Sums, Task
from models.language import DecoderConfig, DecoderLM


class TextTask(Task):
    """A language model on text, measured in bits per byte."""

    what = "a language model on text, byte by byte"
    metric = "bits_per_byte"
    metric_label = "bits per byte"
    targets = "bytes"
    metric_range = (0, 8)

    def make_model(self, model: DecoderConfig, rngs: nnx.Rngs) -> DecoderLM:
        """A decoder."""
        return DecoderLM(model, rngs=rngs)

    def sums(self, model: DecoderLM, batch: dict[str, Array]) -> tuple[Sums, Float[Array, ""]]:
        """Cross entropy in nats, over the targets that belong to their token's document."""
        inputs, segments, targets, weights = text.targets_and_weights(
            batch["tokens"], batch["segment_ids"]
        )
        logits = model(inputs, segment_ids=segments)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return {"loss": (losses * weights).sum()}, weights.sum()

    def check(self, config: TextConfig) -> None:
        """Refuses a vocabulary that is smaller than that of bytes."""
        if config.sequence_length < 1:
            raise ExperimentError(
                f"sequence_length: {config.sequence_length}; it must be at least 1"
            )
        if config.model.vocab_size < text.VOCAB_SIZE:
            raise ExperimentError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than the data's "
                f"vocabulary of {text.VOCAB_SIZE} symbols (256 bytes and the mark of a document's "
                f"start); set it to {text.VOCAB_SIZE} or more"
            )

    def train_dataset(
        self, config: TextConfig, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Packed rows of the training split."""
        return text.train_dataset(
            config.data,
            batch_size=batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation_batches(
        self, config: TextConfig, split: str, max_bytes: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Each byte once: of validation data the beginning, of test data all or `max_bytes`."""
        validation = split == "validation"
        rows = text.evaluation_batches(
            config.data,
            config.data.validation_split if validation else config.data.test_split,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            max_bytes=config.log.evaluate_bytes if validation else max_bytes,
        )
        for batch in rows:
            yield {name: batch[name] for name in ("tokens", "segment_ids")}

    def test_data(
        self, config: TextConfig, max_bytes: int | None = None
    ) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """The test split's bytes, all or the first `max_bytes`."""
        return {"": self.evaluation_batches(config, "test", max_bytes)}

    def baselines(
        self, config: TextConfig, count: int, max_bytes: int | None = None
    ) -> dict[str, float]:
        """Byte models and a compressor, on the bytes that the model was measured on."""
        data = config.data
        documents = list(text.documents(data, data.test_split, max_bytes))
        assert count == sum(map(len, documents)), "the model must be measured on every byte"
        found = {}
        for order in (2, 0):
            fitted = ByteModel(order, text.documents(data, data.train_split))
            found[f"order-{order} byte model"] = fitted.bits(documents) / count
        found["lzma"] = lzma_bits(documents) / count
        return found

    def units(self, config: TextConfig) -> tuple[int, str]:
        """Tokens are bytes."""
        size = config.batch_size, config.sequence_length
        return size[0] * size[1], f"{size[0]} x {size[1]} bytes of {config.data.name}"

    def measures(self, means: Means) -> dict[str, float]:
        """Adds the loss in bits."""
        return {**means, "bits_per_byte": means["loss"] / math.log(2)}

    def line(self, measures: dict[str, float]) -> str:
        """Loss in both units."""
        return f"loss {measures['loss']:.4f}  {measures['bits_per_byte']:.3f} bits/byte"
