"""Images and their classes, from any TFDS data set that has them, at one size.

`train_dataset` gives shuffled batches for ever, `evaluation_batches` each image of a split once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int, UInt8
from PIL import Image

from experiments.data.prepare import damaged, data_directory, examples, prepared

Fit = Literal["resize", "pad"]


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Which images, which parts of them, and what is done to them."""

    name: str = "digits"
    """A TFDS data set with images and classes, such as mnist, cifar10 or imagenet2012. To prepare
    these takes a network, and TensorFlow, once, on any machine; to read them does not. digits is
    scikit-learn's 8 x 8 digits and needs nothing."""
    image_feature: str = "image"
    """The feature of an example that is its image."""
    label_feature: str = "label"
    """The feature of an example that is its class."""
    train_split: str = "train"
    """What is trained on; a part of a split is written train[:95%]."""
    validation_split: str = "validation"
    """What is measured while training."""
    test_split: str = "test"
    """What is measured at the end."""
    data_dir: str | None = None
    """Where prepared data sets are kept; default: $TFDS_DATA_DIR, or else attention_atlas/tfds in
    $XDG_CACHE_HOME or ~/.cache."""
    image_size: int = 8
    """Height and width of all images."""
    fit: Fit = "resize"
    """How images get that size: scaled so that they just cover it, or neither larger nor smaller;
    then what is beyond is cut off on both sides, and what is missing is black."""
    mean: tuple[float, ...] = (0.5,)
    """What is subtracted from values of 0 to 1, for all channels or each."""
    deviation: tuple[float, ...] = (0.5,)
    """What they are divided by then."""
    shift: int = 1
    """Largest number of pixels by which a training image is moved, along each axis."""
    flip: bool = False
    """Whether every second training image is mirrored, left to right; not for digits."""
    read_threads: int = 4
    """Threads that read and decode images ahead; 0: none, when they are asked for."""

    @property
    def directory(self) -> str:
        """Where prepared data sets are kept."""
        return data_directory(self.data_dir)


class TfdsImages:
    """The images of a split with random access, as {"image": uint8 [H, W, C], "label": int}.

    Args:
      config: the data.
      split: which split, or part of one.
      channels: C. Images of one channel are repeated; other numbers are refused.

    Raises:
      ValueError: if there is no such data set, split or feature, or C does not fit.
      OSError: if the data set cannot be prepared.
    """

    def __init__(self, config: ImageDataConfig, split: str, channels: int):
        builder = prepared(config.name, config.directory)
        features = dict(builder.info.features.items())
        for name, key, kind, what in (
            ("image_feature", config.image_feature, tfds.features.Image, "an image"),
            ("label_feature", config.label_feature, tfds.features.ClassLabel, "a class"),
        ):
            if not isinstance(features.get(key), kind):
                known = ", ".join(f"{k} ({type(v).__name__})" for k, v in features.items())
                raise ValueError(
                    f"{name}: {key!r} is not {what} of {config.name}; its features are {known}"
                )
        image = features[config.image_feature]
        found, dtype = image.shape[-1], np.dtype(image.np_dtype)
        if found not in (1, channels) or dtype != np.uint8:
            raise ValueError(
                f"channels: {channels}, but images of {config.name} are {dtype} with {found} "
                "channels"
            )
        self.num_classes: int = features[config.label_feature].num_classes
        """Number of classes."""
        self._channels = channels
        self._examples = examples(builder, split)
        self._folder = builder.data_dir
        self._keys = config.image_feature, config.label_feature

    def __len__(self) -> int:
        """How many there are."""
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One of them.

        Raises:
          OSError: if the files are damaged.
        """
        try:
            example = self._examples[index]
        except Exception as error:  # array_record has RuntimeError and ValueError
            raise damaged(self._folder, error) from error
        image, label = (example[key] for key in self._keys)
        image = np.broadcast_to(image, (*image.shape[:2], self._channels))
        return {"image": image, "label": np.int32(label)}


def fitted(image: UInt8[np.ndarray, "H W C"], size: int, fit: Fit) -> UInt8[np.ndarray, "S S C"]:
    """Returns an image at another size (see `ImageDataConfig.fit`).

    It is scaled bilinearly, over all of the pixels that fall into one where it is made smaller.
    """
    height, width, channels = image.shape
    short = min(height, width)
    if fit == "resize" and short != size:
        # Rounded, and at least the size on both sides.
        height, width = (max(size, round(side * size / short)) for side in (height, width))
        planes = (
            Image.fromarray(np.ascontiguousarray(image[..., i])).resize(
                (width, height), Image.Resampling.BILINEAR
            )
            for i in range(channels)
        )
        image = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return moved(image, size, (0, 0))


def moved(
    image: UInt8[np.ndarray, "H W C"], size: int, by: tuple[int, int]
) -> UInt8[np.ndarray, "S S C"]:
    """Returns the middle of an image that is moved down and right first, black where there is none.

    Args:
      image: the image.
      size: height and width of the result.
      by: number of pixels down, and to the right.
    """
    out = np.zeros((size, size, image.shape[2]), image.dtype)
    here, there = [], []
    for length, step in zip(image.shape[:2], by, strict=True):
        first = (length - size) // 2 - step  # the pixel that comes to the result's edge
        start, stop = max(first, 0), min(first + size, length)
        there.append(slice(start, max(stop, start)))
        here.append(slice(start - first, max(stop, start) - first))
    out[tuple(here)] = image[tuple(there)]
    return out


def _normalised(image: UInt8[np.ndarray, "S S C"], config: ImageDataConfig) -> np.ndarray:
    mean, deviation = (np.float32(x) for x in (config.mean, config.deviation))
    return (image.astype(np.float32) / 255 - mean) / deviation


def train_dataset(
    config: ImageDataConfig,
    *,
    batch_size: int,
    seed: int,
    channels: int,
    num_classes: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Batches of the training split, for ever.

    Images are shuffled anew each epoch and dealt out to the processes, which together take each
    once an epoch (but for the last few, fewer than processes); epochs follow each other within
    batches. How an image is moved and mirrored depends on the seed and on its place in that order.
    The iterator's state can be saved after any batch (`get_state`, `grain.checkpoint`), and a
    restored one gives the same batches as if it had gone on.

    Args:
      config: the data.
      batch_size: images in a batch of this process.
      seed: determines order and changes, >= 0.
      channels: of the model; images of one channel are repeated.
      num_classes: of the model; it must have all of the data's.
      process_index: which part of each epoch, from 0.
      process_count: number of parts.

    Returns:
      batches {"images": float32 [B, S, S, C], "labels": int32 [B]}.

    Raises:
      ValueError: if an argument is out of range, the data set, split or feature is unknown, or
        there are fewer images than processes.
      OSError: if the data cannot be prepared or read.
    """
    _check(config, batch_size, channels)
    if seed < 0:
        raise ValueError(f"seed: {seed}; it must be at least 0")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: {process_index}; it must be in 0..{process_count - 1}")
    source = _opened(config, config.train_split, channels, num_classes)
    if len(source) < process_count:
        raise ValueError(
            f"{len(source)} images in {config.name} {config.train_split} are too few for "
            f"{process_count} processes"
        )

    def changed(number: int, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, process_index, number))
        image = fitted(example["image"], config.image_size, config.fit)
        by = rng.integers(-config.shift, config.shift, 2, endpoint=True)
        image = moved(image, config.image_size, tuple(by.tolist()))
        if config.flip and rng.integers(2):
            image = image[:, ::-1]
        return {"images": _normalised(image, config), "labels": example["label"]}

    # Epoch e is shuffled with this + e: were it the seed itself, neighbouring seeds would have
    # orders in common.
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    dataset = grain.MapDataset.source(source).shuffle(seed=order)
    dataset = dataset[process_index::process_count].repeat(None).map_with_index(changed)
    threads = config.read_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(options)


def evaluation_batches(
    config: ImageDataConfig, split: str, *, batch_size: int, channels: int, num_classes: int
) -> Iterator[dict[str, Float[np.ndarray, "B ..."] | Int[np.ndarray, " B"]]]:
    """Batches in which every image of a split has the weight 1 exactly once, unchanged.

    Args:
      config: the data.
      split: a split of the data set, such as `config.test_split`.
      batch_size: images in a batch. The last one is filled up with black ones of weight 0.
      channels: as for `train_dataset`.
      num_classes: likewise.

    Returns:
      an iterator of {"images": float32 [B, S, S, C], "labels": int32 [B], "weights": float32 [B]}.

    Raises:
      ValueError, OSError: as `train_dataset`.
    """
    _check(config, batch_size, channels)
    source = _opened(config, split, channels, num_classes)
    return _evaluation_batches(source, config, batch_size, channels)


def _evaluation_batches(
    source: TfdsImages, config: ImageDataConfig, batch_size: int, channels: int
) -> Iterator[dict[str, np.ndarray]]:
    size = config.image_size
    for numbers in itertools.batched(range(len(source)), batch_size):
        images = np.zeros((batch_size, size, size, channels), np.uint8)
        labels, weights = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.float32)
        for row, number in enumerate(numbers):
            example = source[number]
            images[row] = fitted(example["image"], size, config.fit)
            labels[row], weights[row] = example["label"], 1
        yield {"images": _normalised(images, config), "labels": labels, "weights": weights}


def _opened(config: ImageDataConfig, split: str, channels: int, num_classes: int) -> TfdsImages:
    source = TfdsImages(config, split, channels)
    if source.num_classes > num_classes:
        raise ValueError(
            f"num_classes: {num_classes}, but {config.name} has {source.num_classes} classes"
        )
    return source


def _check(config: ImageDataConfig, batch_size: int, channels: int) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("channels", channels, 1),
        ("image_size", config.image_size, 1),
        ("shift", config.shift, 0),
        ("read_threads", config.read_threads, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: {value}; it must be at least {least}")
    if config.fit not in get_args(Fit):
        raise ValueError(f"fit: {config.fit!r}; it must be one of {', '.join(get_args(Fit))}")
    for name in ("mean", "deviation"):
        values = getattr(config, name)
        if len(values) not in (1, channels):
            raise ValueError(f"{name}: {values}; it must be one number, or one for each channel")
    if min(config.deviation) <= 0:
        raise ValueError(f"deviation: {config.deviation}; it must be positive")
