"""The texts of any TFDS data set, by index."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow_datasets as tfds

from experiments.data.prepare import damaged, examples, prepared

# A read of array_record has a cost of its own, a millisecond in a file of many examples.
_READ_BYTES = 2**20
_READ_EXAMPLES = 4096


class TfdsTexts:
    """The texts of a split, as bytes, with random access.

    Args:
      builder: the prepared data set.
      examples: the split's examples.
      feature: which feature is the text.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        examples: tfds.core.data_sources.BaseDataSource,
        feature: str,
    ):
        self._folder = builder.data_dir
        self._examples = examples
        self._feature = feature
        self.full_name = builder.info.full_name
        """The data set's name with its configuration and version."""
        size = builder.info.dataset_size / max(builder.info.splits.total_num_examples, 1)
        self.read_ahead = max(1, min(int(_READ_BYTES / max(size, 1)), _READ_EXAMPLES, len(self)))
        """How many to read at once."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self._examples)

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Some texts by their indices.

        Raises:
          OSError: if the files are damaged.
        """
        try:
            return [example[self._feature] for example in self._examples.__getitems__(indices)]
        except Exception as error:  # array_record has RuntimeError and ValueError
            raise damaged(self._folder, error) from error


def open_texts(name: str, split: str, *, feature: str, data_dir: str) -> TfdsTexts:
    """Opens a split of a data set, which is prepared first if it is not in `data_dir` yet.

    Args:
      name: a TFDS data set, with its configuration if it has several: wiki40b/en.
      split: a split or part of one: train, train[:95%].
      feature: the feature of an example that is its text.
      data_dir: where prepared data sets are kept.

    Raises:
      ValueError: if there is no such data set, configuration, split or text feature.
      OSError: if the data set cannot be prepared: no network, no space, a package that this data
        set needs and that is not installed.
    """
    builder = prepared(name, data_dir)
    features = dict(builder.info.features.items())
    if not isinstance(features.get(feature), tfds.features.Text):
        known = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
        raise ValueError(
            f"text_feature: {feature!r} is no text feature of {name}; its features are {known}"
        )
    return TfdsTexts(builder, examples(builder, split), feature)
