"""Images: the digits, the pipeline of training batches, evaluation batches, and the task."""

import dataclasses
import itertools
import json
import socket
import types

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from experiments import parallel
from experiments.config import MeshConfig, OptimizerConfig
from experiments.data.images import (
    ImageDataConfig,
    evaluation_batches,
    fitted,
    moved,
    train_dataset,
)
from experiments.errors import ExperimentError
from experiments.step import Trainer
from experiments.tasks.images import ImagesTask, classification_sums
from models.vision_config import (
    ViTConfig,
)

CLASSES = {"channels": 1, "num_classes": 10}
COLOURS = [np.random.default_rng(i).integers(0, 256, (5 + i, 9 - i, 3), np.uint8) for i in range(5)]


class TinyColours(tfds.core.GeneratorBasedBuilder):
    """What a user's own TFDS data set looks like: images of several sizes, found by its name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="tiny"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(COLOURS):
            yield i, {"picture": Image.fromarray(image), "kind": i % 2}


class EncodedArrays(TinyColours):
    """Has arrays, as mnist and cifar10, which TFDS encodes by TensorFlow."""

    def _generate_examples(self):
        yield 0, {"picture": COLOURS[0], "kind": 0}


@pytest.fixture(scope="module")
def digits(data_directory):
    return ImageDataConfig(data_dir=str(data_directory), read_threads=0)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return ImageDataConfig(
        name="tiny_colours",
        image_feature="picture",
        label_feature="kind",
        validation_split="train",
        image_size=6,
        shift=0,
        read_threads=0,
        data_dir=str(tmp_path_factory.mktemp("colours")),
    )


def batches(config, count, *, batch_size=64, seed=0, **others):
    dataset = train_dataset(config, batch_size=batch_size, seed=seed, **(CLASSES | others))
    return list(itertools.islice(iter(dataset), count))


def joined(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def rows(batch):
    """The images as bytes, to be counted."""
    return sorted(image.tobytes() for image in batch["images"])


def test_digits_are_those_of_scikit_learn(digits, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    source = load_digits()
    expected = {(x.tobytes(), y) for x, y in zip(source.images, source.target, strict=True)}
    found = []
    for split, count in (("train", 1438), ("validation", 179), ("test", 180)):
        batch = joined(list(evaluation_batches(digits, split, batch_size=180, **CLASSES)))
        kept = batch["weights"] == 1
        assert kept.sum() == count and len(kept) % 180 == 0
        assert (batch["images"][~kept] == -1).all()
        grey = np.rint((batch["images"][kept, ..., 0] * 0.5 + 0.5) * 16).astype(float)
        found += [(x.tobytes(), y) for x, y in zip(grey, batch["labels"][kept], strict=True)]
    assert len(found) == len(source.target) and set(found) == expected


def test_an_epoch_has_each_image_once(digits):
    """Then the next has each once, in another order; epochs follow each other within batches."""
    config = dataclasses.replace(digits, shift=0, train_split="validation")
    (everything,) = evaluation_batches(config, "validation", batch_size=179, **CLASSES)
    found = joined(batches(config, 6))
    assert found["images"].shape == (384, 8, 8, 1) and found["images"].dtype == np.float32
    assert found["labels"].dtype == np.int32
    epochs = [{n: x[k : k + 179] for n, x in found.items()} for k in (0, 179)]
    for epoch in epochs:
        assert rows(epoch) == rows(everything)
        assert (np.bincount(epoch["labels"]) == np.bincount(everything["labels"])).all()
    assert (epochs[0]["labels"] != epochs[1]["labels"]).mean() > 0.5


def test_batches_depend_on_the_seed_alone(digits):
    first = joined(batches(digits, 3))
    threads = joined(batches(dataclasses.replace(digits, read_threads=3), 3))
    jax.tree.map(np.testing.assert_array_equal, first, threads)
    other = joined(batches(digits, 3, seed=1))
    assert (first["labels"] != other["labels"]).mean() > 0.5


@pytest.mark.parametrize("threads", (0, 2))
def test_batches_go_on_where_they_stopped(digits, threads):
    config = dataclasses.replace(digits, read_threads=threads, train_split="validation")
    rows = iter(train_dataset(config, batch_size=32, seed=3, **CLASSES))
    for _ in range(9):  # into the second epoch
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    expected = joined([next(rows) for _ in range(4)])
    resumed = iter(train_dataset(config, batch_size=32, seed=3, **CLASSES))
    resumed.set_state(state)
    found = joined([next(resumed) for _ in range(4)])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_processes_share_an_epoch(digits):
    config = dataclasses.replace(digits, shift=0, train_split="validation[:100]")
    parts = [
        batches(config, 1, batch_size=50, process_index=i, process_count=2)[0] for i in range(2)
    ]
    (everything,) = evaluation_batches(config, "validation[:100]", batch_size=100, **CLASSES)
    assert rows(joined(parts)) == rows(everything)


def test_images_are_moved_and_mirrored(digits):
    still = dataclasses.replace(digits, shift=0)
    plain = batches(still, 1)[0]["images"]
    shifted = batches(dataclasses.replace(digits, shift=2), 1)[0]["images"]
    steps = set()
    for before, after in zip(plain, shifted, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), constant_values=-1)
        steps |= {
            (i - 2, j - 2)
            for i in range(5)
            for j in range(5)
            if (padded[i : i + 8, j : j + 8] == after).all()
        }
    assert {abs(i) for i, _ in steps} == {abs(j) for _, j in steps} == {0, 1, 2}
    mirrored = batches(dataclasses.replace(still, flip=True), 1)[0]["images"]
    same = (mirrored == plain).all(axis=(1, 2, 3))
    assert (same | (mirrored == plain[:, :, ::-1]).all(axis=(1, 2, 3))).all()
    assert 15 < same.sum() < 49


@pytest.mark.parametrize("size", (4, 7, 12))
@pytest.mark.parametrize("by", ((0, 0), (1, -2), (-9, 3)))
def test_moved_pixel_by_pixel(size, by):
    image = np.random.default_rng(0).integers(1, 256, (7, 10, 2), np.uint8)
    expected = np.zeros((size, size, 2), np.uint8)
    for i, j in itertools.product(range(size), repeat=2):
        y, x = i + (7 - size) // 2 - by[0], j + (10 - size) // 2 - by[1]
        if 0 <= y < 7 and 0 <= x < 10:
            expected[i, j] = image[y, x]
    np.testing.assert_array_equal(moved(image, size, by), expected)


def test_fitted():
    ramp = np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (20, 30, 3))
    small = fitted(ramp, 10, "resize")
    # Half as large and cut at both sides; each pixel is between the two that it is made of.
    assert small.shape == (10, 10, 3)
    means = (ramp[0, 0::2, 0].astype(int) + ramp[0, 1::2, 0]) // 2
    np.testing.assert_allclose(small[5, :, 1], means[2:12], atol=1)
    assert (fitted(ramp, 40, "resize") > 0)[:, 1:].all()
    np.testing.assert_array_equal(fitted(ramp, 10, "pad"), ramp[5:15, 10:20])
    padded = fitted(ramp, 40, "pad")
    assert padded.sum() == ramp.sum() and (padded[:10] == 0).all()
    for shape in ((7, 13), (13, 7), (8, 8), (1, 5)):
        assert fitted(np.zeros((*shape, 1), np.uint8), 8, "resize").shape == (8, 8, 1)


@pytest.mark.parametrize("fit", ("resize", "pad"))
def test_a_data_set_by_its_name(colours, fit):
    """Images of several sizes and colours, normalised by channel."""
    config = dataclasses.replace(colours, fit=fit, mean=(0.1, 0.2, 0.3), deviation=(1, 2, 4))
    (batch,) = evaluation_batches(config, "train", batch_size=5, channels=3, num_classes=2)
    expected = np.stack([fitted(image, 6, fit) for image in COLOURS]) / 255
    expected = (expected - [0.1, 0.2, 0.3]) / [1, 2, 4]
    order = [int(np.abs(expected - image).sum((1, 2, 3)).argmin()) for image in batch["images"]]
    assert sorted(order) == list(range(5))
    np.testing.assert_allclose(batch["images"], expected[order], atol=1e-6)
    assert batch["labels"].tolist() == [i % 2 for i in order]


def test_grey_images_for_a_model_of_colours(digits):
    (batch,) = batches(digits, 1, batch_size=8, channels=3)
    assert batch["images"].shape == (8, 8, 8, 3)
    assert (batch["images"] == batch["images"][..., :1]).all()


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    (
        ({"name": "digit"}, {}, ValueError, r"no data set 'digit'. Did you mean digits\?"),
        ({"train_split": "dev"}, {}, ValueError, "has no 'dev'"),
        ({"image_feature": "picture"}, {}, ValueError, "'picture' is not an image of digits"),
        ({"label_feature": "image"}, {}, ValueError, "label_feature: 'image' is not a class"),
        ({"image_size": 0}, {}, ValueError, "image_size: 0; it must be at least 1"),
        ({"shift": -1}, {}, ValueError, "shift: -1; it must be at least 0"),
        ({"fit": "stretch"}, {}, ValueError, "fit: 'stretch'; it must be one of resize, pad"),
        ({"mean": (0.5, 0.5)}, {}, ValueError, r"mean: \(0.5, 0.5\); it must be one number"),
        ({"deviation": (0.0,)}, {}, ValueError, "deviation: .*must be positive"),
        ({}, {"num_classes": 9}, ValueError, "num_classes: 9, but digits has 10 classes"),
        ({}, {"batch_size": 0}, ValueError, "batch_size: 0"),
        ({}, {"seed": -1}, ValueError, "seed: -1"),
        ({}, {"process_index": 1}, ValueError, r"process_index: 1; it must be in 0\.\.0"),
        ({}, {"process_count": 2000}, ValueError, "1438 images in digits train are too few for"),
    ),
)
def test_errors(digits, changes, arguments, error, message):
    config = dataclasses.replace(digits, **changes)
    with pytest.raises(error, match=message):
        batches(config, 0, **arguments)


def test_errors_of_other_data_sets(colours):
    with pytest.raises(ValueError, match="channels: 1, but images of tiny_colours are uint8 with"):
        evaluation_batches(colours, "train", batch_size=1, channels=1, num_classes=2)
    config = dataclasses.replace(colours, name="encoded_arrays")
    with pytest.raises(OSError, match=r"pip install tensorflow.*another machine and copy"):
        evaluation_batches(config, "train", batch_size=1, channels=3, num_classes=2)


def test_classification_sums():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    weights = np.array([1, 1, 0, 1, 0], np.float32)
    exact = logits.astype(np.float64)
    losses = np.log(np.exp(exact).sum(1)) - exact[np.arange(5), labels]
    sums, count = classification_sums(logits, labels, weights)
    np.testing.assert_allclose(sums["loss"], losses[[0, 1, 3]].sum(), rtol=1e-5)
    assert sums["accuracy"] == (logits.argmax(1) == labels)[[0, 1, 3]].sum() and count == 3
    sums, count = classification_sums(logits, labels, label_smoothing=0.3)
    spread = np.log(np.exp(exact).sum(1)) - exact.mean(1)
    np.testing.assert_allclose(sums["loss"], (0.7 * losses + 0.3 * spread).sum(), rtol=1e-5)
    assert count == 5


MODEL = ViTConfig(patch_size=4, features=32, num_layers=1, num_heads=2)


def test_training_learns_the_digits(digits, quick_compilation):
    """The loss of images that were not seen falls well below that of guessing, on a mesh."""
    task, steps = ImagesTask(), 20
    config = types.SimpleNamespace(
        model=MODEL, data=dataclasses.replace(digits, shift=0), batch_size=64, seed=0
    )
    task.check(config)
    assert task.units(config) == (64 * 5, "64 images of digits, 8 x 8")
    mesh = parallel.make_mesh(MeshConfig(data=4, tensor=2))
    with parallel.use_mesh(mesh):
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
        trainer = Trainer(MODEL, optimizer, mesh, steps=steps, task=task)
        state = trainer.initial()
        dataset = task.train_dataset(config, batch_size=64, process_index=0, process_count=1)
        losses = []
        for batch in itertools.islice(iter(dataset), steps):
            state, metrics = trainer.step(state, parallel.global_batch(batch, mesh))
            losses.append(metrics["loss"])
        total = np.zeros(3)
        for batch in task.evaluation_batches(config, "validation"):
            batch = parallel.global_batch(batch, mesh)
            sums, count = trainer.measure(state.parameters, batch)
            total += [sums["loss"], sums["accuracy"], count]
    assert abs(losses[0] - np.log(10)) < 0.7
    assert total[2] == 179
    assert total[0] / 179 < 1.7 and total[1] / 179 > 0.35
    kernel = state.parameters["layers"][0]["attention"]["query"]["kernel"]
    assert "tensor" in str(kernel.get_value().sharding.spec)


def test_the_task_refuses_other_sizes(digits):
    config = types.SimpleNamespace(model=MODEL, data=dataclasses.replace(digits, image_size=16))
    with pytest.raises(ExperimentError, match=r"data.image_size: 16, but model.image_size is 8"):
        ImagesTask().check(config)


def test_a_grain_data_set(digits):
    """So that the training loop saves its position with the checkpoints."""
    dataset = train_dataset(digits, batch_size=4, seed=0, **CLASSES)
    assert isinstance(dataset, grain.IterDataset)
