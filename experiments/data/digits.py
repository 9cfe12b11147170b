"""A data set of images that every machine has: scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Share of the images."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `digits`: 1797 images of 8 x 8 grey values, ten classes.

    They are those that scikit-learn brings along (`sklearn.datasets.load_digits`), with their 17
    grey values spread over 0 to 255. Splits: train, validation and test, 1438, 179 and 180 images
    that follow each other there, so that neighbours, which one hand may have written, stay
    together. Nothing is downloaded.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (1998), of which it is the test part.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (declared so by TFDS)
    # Nothing is downloaded, so there are no checksums to look for beside this file.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8 x 8 grey values, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="CC-BY-4.0",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        from sklearn.datasets import (
            load_digits,
        )  # it takes a second, and is for who prepares it only

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        ends = np.rint(np.cumsum([0, *SPLITS.values()]) * len(images)).astype(int)
        return {
            name: self._generate_examples(images, digits.target, range(start, end))
            for name, start, end in zip(SPLITS, ends[:-1], ends[1:], strict=True)
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, numbers: range
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in numbers:
            # TFDS encodes arrays by TensorFlow, and Pillow's images by Pillow.
            yield i, {"image": Image.fromarray(images[i]), "label": int(labels[i])}
