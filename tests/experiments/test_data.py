"""The data: python_source, the pipeline of training rows, evaluation batches, and their errors."""

import collections
import dataclasses
import errno
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
import urllib3.util.retry
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core.download import downloader

import experiments
from experiments.data import python_source
from experiments.data.python_source import PythonSource, PythonSourceConfig
from experiments.data.text import (
    BOS,
    VOCAB_SIZE,
    TextDataConfig,
    documents,
    evaluation_batches,
    targets_and_weights,
    train_dataset,
)

REPOSITORY = Path(experiments.__file__).parents[1]


def random_texts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length, np.uint8).tobytes() for length in lengths]


TRAIN = random_texts(0, [0, 1, 2, 49, 50, 51, 3000, 2500, *range(3, 700, 23)])
TEST = random_texts(1, [0, 5, 1, 1200, 30, 31, 32, 64, 300])


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """What a user's own TFDS data set looks like; found by its name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"body": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="tiny"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"body": text, "label": i % 2}


class RacedTexts(TinyTexts):
    """Another process, which holds no lock, prepares it while it is being prepared."""

    raced = False

    def _split_generators(self, dl_manager):
        if not RacedTexts.raced:
            RacedTexts.raced = True
            other = tfds.builder(
                "raced_texts", data_dir=self.data_dir_root, file_format="array_record"
            )
            other.download_and_prepare()
        return super()._split_generators(dl_manager)


class DownloadedTexts(TinyTexts):
    """Needs a server; nothing listens at port 1."""

    def _split_generators(self, dl_manager):
        dl_manager.download("http://127.0.0.1:1/texts")


class NeedyTexts(TinyTexts):
    """Needs a package."""

    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("No module named 'apache_beam'", name="apache_beam")


class LargeTexts(TinyTexts):
    """Does not fit on the disk."""

    def _generate_examples(self, texts):
        yield from itertools.islice(super()._generate_examples(texts), 3)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return TextDataConfig(
        name="tiny_texts",
        text_feature="body",
        validation_split="test",
        data_dir=str(tmp_path_factory.mktemp("tiny")),
    )


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def library(data_directory):
    """python_source of the running interpreter."""
    config = TextDataConfig(data_dir=str(data_directory))
    next(documents(config, "train"))
    return config


def source_lines(rng, count):
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "result", "buffer"]
    return [
        f"{' '.join(rng.choice(words, 3))} = {rng.integers(10**12)}  # a line of its own"
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A library of 120 unrelated files, copies, a family of near copies, and what is no text."""
    root = tmp_path_factory.mktemp("tree") / "lib"
    rng = np.random.default_rng(0)
    (root / "pkg").mkdir(parents=True)
    for i in range(120):
        (root / f"m{i:03}.py").write_text("\n".join(source_lines(rng, 30)))
    common = source_lines(rng, 12)
    for i in range(8):
        lines = [f"    {line}" if i % 2 else line for line in common] + source_lines(rng, 25)
        (root / "pkg" / f"near{i}.py").write_text("\n".join(lines))
    (root / "pkg" / "copy.py").write_bytes((root / "m007.py").read_bytes())
    (root / "notes.rst").write_text("\n".join(source_lines(rng, 30)))
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes("# näher".encode("latin-1"))
    (root / "nul.py").write_bytes(b"x = '\0'")
    (root / "table.decTest").write_text("add001 add 1 1 -> 2")
    for folder in ("site-packages", "__pycache__", "config-3.12-linux", "lib-dynload"):
        (root / folder).mkdir()
        (root / folder / "other.py").write_text("x = 1")
    return root


def build(tree, folder):
    builder = PythonSource(
        config=PythonSourceConfig.of(tree), data_dir=str(folder), file_format="array_record"
    )
    builder.download_and_prepare()
    return builder


def records(builder, split):
    return [(e["path"].decode(), e["text"]) for e in builder.as_data_source(split)]


def test_python_source_has_every_text_file_once(tree, tmp_path, no_network):
    builder = build(tree, tmp_path)
    found = [record for split in builder.info.splits for record in records(builder, split)]
    paths = [*tree.glob("m*.py"), *tree.glob("pkg/near*.py"), tree / "notes.rst"]
    expected = {str(path.relative_to(tree)): path.read_bytes() for path in paths}
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_python_source_is_the_same_every_time(tree, tmp_path, no_network):
    first, second = build(tree, tmp_path / "a"), build(tree, tmp_path / "b")
    for split in ("train", "validation", "test"):
        assert records(first, split) == records(second, split)


def test_splits_do_not_depend_on_the_order_of_files(tree):
    files = python_source.read_files((str(tree),))
    shuffled = dict(sorted(files.items(), key=lambda item: item[1]))
    assert python_source.split_files(shuffled) == python_source.split_files(files)


def test_near_duplicates_are_one_group(tree):
    groups = python_source.near_duplicates(python_source.read_files((str(tree),)))
    together = [group for group in groups if len(group) > 1]
    assert together == [
        ["m007.py", "pkg/copy.py"],
        [f"pkg/near{i}.py" for i in range(8)],
    ]


@pytest.mark.parametrize(("shared", "together"), [(8, True), (7, False)])
def test_near_duplicates_share_a_fifth_and_three_lines(shared, together):
    rng = np.random.default_rng(1)
    a, b = source_lines(rng, 25), source_lines(rng, 60)
    files = {"a": a, "b": b[shared:] + a[:shared]}
    files = {path: "\n".join(lines).encode() for path, lines in files.items()}
    assert len(python_source.near_duplicates(files)) == (1 if together else 2)


def test_short_lines_are_no_evidence():
    short = "\n".join(f"import m{i}" for i in range(50)).encode()
    assert len(python_source.near_duplicates({"a": short, "b": short + b"\nx = 1"})) == 2


def test_a_large_group_is_in_train():
    rng = np.random.default_rng(2)
    files = {f"f{i:02}": "\n".join(source_lines(rng, 20)).encode() for i in range(99)}
    for large in ("large0", "large1", "large2", "large3"):
        files[large] = "\n".join(source_lines(rng, 60)).encode()
    splits = python_source.split_files(files)
    assert set(splits["train"]) > {"large0", "large1", "large2", "large3"}
    total = sum(map(len, files.values()))
    for name in ("validation", "test"):
        size = sum(len(files[path]) for path in splits[name])
        assert 0.03 * total <= size < 0.045 * total


def test_too_few_files_are_refused():
    with pytest.raises(ValueError, match="2 different files are too few for three splits"):
        python_source.split_files({"a": b"x", "b": b"y", "c": b"y"})


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text files in"):
        python_source.read_files((str(tmp_path),))


def test_fingerprint_is_that_of_the_text(tree, tmp_path):
    root = tmp_path / "lib"
    root.mkdir()
    (root / "a.py").write_text("x = 1")
    (root / "b.py").write_text("y = 1")
    before = python_source.fingerprint((str(root),))
    assert platform.python_version() in before

    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "a.py").write_text("compiled")
    os.utime(root / "a.py", (1, 1))
    assert python_source.fingerprint((str(root),)) == before

    (root / "a.py").write_text("x = 2")
    changed = python_source.fingerprint((str(root),))
    (root / "a.py").write_text("x = 1")
    (root / "b.py").rename(root / "c.py")
    renamed = python_source.fingerprint((str(root),))
    assert len({before, changed, renamed}) == 3


def test_a_cache_of_another_python_is_not_read(tree, tmp_path):
    old = build(tree, tmp_path)
    changed = PythonSourceConfig(
        name=python_source.fingerprint((str(tree / "pkg"),)), roots=(str(tree),)
    )
    new = PythonSource(config=changed, data_dir=str(tmp_path), file_format="array_record")
    assert not new.data_path.exists()
    config = TextDataConfig(name=f"python_source/{old.builder_config.name}", data_dir=str(tmp_path))
    assert list(documents(config, "test")) == [text for _, text in records(old, "test")]


def test_the_library_is_split_without_leaks(library):
    builder = tfds.builder("python_source", data_dir=library.data_dir, file_format="array_record")
    splits = {name: dict(records(builder, name)) for name in ("train", "validation", "test")}
    sizes = {name: sum(map(len, files.values())) for name, files in splits.items()}
    total = sum(sizes.values())
    assert sizes["train"] > 0.9 * total
    for name in ("validation", "test"):
        assert 0.03 * total <= sizes[name] <= 0.05 * total
    paths = [path for files in splits.values() for path in files]
    texts = [text for files in splits.values() for text in files.values()]
    assert len(set(paths)) == len(paths)
    assert len(set(texts)) == len(texts)
    assert not [path for path in paths if "site-packages" in path or "__pycache__" in path]

    where, lines_of = collections.defaultdict(list), {}
    for name, files in splits.items():
        for path, text in files.items():
            stripped = map(bytes.strip, text.splitlines())
            lines_of[path] = {line for line in stripped if len(line) >= 20}
            for line in lines_of[path]:
                where[line].append((name, path))
    shared = collections.Counter()
    for places in where.values():
        for (split, path), (other_split, other) in itertools.combinations(places, 2):
            if split != other_split:
                shared[path, other] += 1
    assert shared
    for (path, other), count in shared.items():
        fewer = min(len(lines_of[path]), len(lines_of[other]))
        assert count < 3 + 0.2 * fewer, (path, other, count, fewer)


BUILD_AND_HASH = """
import hashlib, logging, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("experiments").setLevel(logging.INFO)
from experiments.data.text import TextDataConfig, documents
config = TextDataConfig(data_dir=sys.argv[1])
digest = hashlib.sha256(b"".join(documents(config, "train"))).hexdigest()
print(digest)
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    processes = [start(BUILD_AND_HASH, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    hashes = {stdout for stdout, _ in outputs}
    assert len(hashes) == 1
    assert len(hashes.pop().split()) == 1
    messages = "".join(stderr for _, stderr in outputs).splitlines()
    assert sum("building python_source" in line for line in messages) == 1
    assert all("building" in line or "waiting" in line for line in messages), messages
    assert not list(tmp_path.rglob("incomplete*"))


HANG_WHILE_BUILDING = """
import pathlib, sys, time
from experiments.data.python_source import PythonSource, PythonSourceConfig
from experiments.data.text import TextDataConfig, documents
source = PythonSourceConfig.of(sys.argv[3])
PythonSource.get_default_builder_config = lambda self: source
generate = PythonSource._generate_examples
def hang(self, files):
    yield from generate(self, dict(list(files.items())[:2]))
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(600)
PythonSource._generate_examples = hang
next(documents(TextDataConfig(data_dir=sys.argv[1]), "train"))
"""


@pytest.mark.slow
def test_a_killed_build_is_built_again(tmp_path, tree, monkeypatch):
    process = start(HANG_WHILE_BUILDING, tmp_path / "data", tmp_path / "half-way", tree)
    deadline = time.monotonic() + 120
    while not (tmp_path / "half-way").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((tmp_path / "data").rglob("incomplete*"))

    monkeypatch.setattr(
        PythonSource, "get_default_builder_config", lambda self: PythonSourceConfig.of(tree)
    )
    config = TextDataConfig(data_dir=str(tmp_path / "data"))
    expected = [text for _, text in records(build(tree, tmp_path / "undisturbed"), "test")]
    assert list(documents(config, "test")) == expected
    assert not list((tmp_path / "data").rglob("incomplete*"))


def test_a_build_that_another_one_overtook_is_used(tmp_path):
    config = TextDataConfig(name="raced_texts", text_feature="body", data_dir=str(tmp_path))
    assert sorted(documents(config, "train")) == sorted(TRAIN)
    assert RacedTexts.raced
    assert not list(tmp_path.rglob("incomplete*"))


def test_python_source_is_built_quietly(tmp_path, tree, monkeypatch, capfd):
    monkeypatch.setattr(
        PythonSource, "get_default_builder_config", lambda self: PythonSourceConfig.of(tree)
    )
    assert next(documents(TextDataConfig(data_dir=str(tmp_path)), "test"))
    assert capfd.readouterr() == ("", "")


def test_directory(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert TextDataConfig().directory == "/home/me/.cache/attention_atlas/tfds"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert TextDataConfig().directory == "/cache/attention_atlas/tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert TextDataConfig().directory == "/home/me/data"
    assert TextDataConfig(data_dir="here").directory == "here"


def take(config, count, *, length=50, batch_size=1, seed=0, **kwargs):
    """The first rows of the training data."""
    dataset = train_dataset(
        config, batch_size=batch_size, sequence_length=length, seed=seed, **kwargs
    )
    batches = itertools.islice(dataset, count // batch_size)
    rows = collections.defaultdict(list)
    for batch in batches:
        assert batch.keys() == {"tokens", "segment_ids"}
        for name, array in batch.items():
            assert array.dtype == np.int32
            assert array.shape == (batch_size, length + 1)
            rows[name].extend(array)
    return {name: np.stack(arrays) for name, arrays in rows.items()}


def in_order(config):
    """The same data with windows of one row: the stream as it is."""
    return dataclasses.replace(config, shuffle_bytes=1)


def stream_of(tokens):
    """Undoes the cutting into rows."""
    np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])
    return np.concatenate([tokens[0, :1], tokens[:, 1:].ravel()])


def complete_texts(stream):
    """The documents that end within a stream."""
    starts = np.flatnonzero(stream == BOS)
    assert starts[0] == 0
    pairs = itertools.pairwise(starts)
    return [stream[a + 1 : b].astype(np.uint8).tobytes() for a, b in pairs]


@pytest.mark.parametrize("length", [7, 50, 5000, 100_000])
def test_no_byte_is_lost_in_three_epochs(tiny, length):
    tokens = sum(len(text) + 1 for text in TRAIN)
    rows = take(in_order(tiny), 3 * tokens // length + 2, length=length)
    texts = complete_texts(stream_of(rows["tokens"]))
    epochs = [texts[i * len(TRAIN) : (i + 1) * len(TRAIN)] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(TRAIN)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_segment_ids_count_the_documents_of_a_row(tiny):
    rows = take(in_order(tiny), 400, length=130)
    for tokens, ids in zip(rows["tokens"], rows["segment_ids"], strict=True):
        expected = 1
        for j, token in enumerate(tokens):
            if token == BOS and j > 0:
                expected += 1
            assert ids[j] == expected
    assert rows["segment_ids"].max() > 3


def sorted_rows(rows):
    return sorted(map(tuple, rows.tolist()))


def test_shuffling_keeps_the_rows_of_each_window(tiny):
    length, window = 50, 20
    num_rows = sum(len(text) + 1 for text in TRAIN) // length
    expected = take(in_order(tiny), num_rows, length=length)["tokens"]
    config = dataclasses.replace(tiny, shuffle_bytes=window * length)
    actual = take(config, num_rows, length=length)["tokens"]
    assert num_rows % window and num_rows > 5 * window
    orders = set()
    for begin in range(0, num_rows, window):
        a, b = (sorted_rows(rows[begin : begin + window]) for rows in (expected, actual))
        assert a == b
        in_stream = expected[begin : begin + window].tolist()
        orders.add(tuple(in_stream.index(row) for row in actual[begin : begin + window].tolist()))
    assert len(orders) == -(-num_rows // window)
    assert (expected != actual).any(axis=1).mean() > 0.8


def test_an_epoch_ends_before_the_next_begins(tiny):
    num_rows = (sum(len(text) + 1 for text in TRAIN) - 1) // 50
    expected = take(in_order(tiny), 2 * num_rows)["tokens"]
    actual = take(tiny, 2 * num_rows)["tokens"]
    assert sorted_rows(actual[:num_rows]) == sorted_rows(expected[:num_rows])
    assert sorted_rows(actual[:num_rows]) != sorted_rows(actual[num_rows:])


def test_a_batch_has_rows_of_many_documents(tiny):
    def documents_in_batches(config):
        tokens = take(config, 160, length=24, batch_size=16)["tokens"]
        counts = []
        for batch in tokens.reshape(10, 16, 25):
            found = set()
            for row in batch:
                piece = row[row != BOS][:8].astype(np.uint8).tobytes()
                found |= {i for i, text in enumerate(TRAIN) if piece in text}
            counts.append(len(found))
        return np.mean(counts)

    assert documents_in_batches(tiny) > 7
    assert documents_in_batches(in_order(tiny)) < 5


def test_seeds_determine_the_order(tiny):
    rows = [take(tiny, 100, seed=seed)["tokens"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_neighbouring_seeds_have_no_epoch_in_common(tiny):
    tokens = sum(len(text) + 1 for text in TRAIN)
    epochs = set()
    for seed in range(4):
        rows = take(in_order(tiny), 3 * tokens // 50 + 2, seed=seed)
        texts = complete_texts(stream_of(rows["tokens"]))
        epochs |= {tuple(texts[i * len(TRAIN) : (i + 1) * len(TRAIN)]) for i in range(3)}
    assert len(epochs) == 12


@pytest.mark.parametrize("parts", [1, 2, 3, len(TRAIN)])
def test_processes_share_out_each_epoch(tiny, parts):
    by_epoch = collections.defaultdict(list)
    for part in range(parts):
        rows = take(in_order(tiny), 900 // parts + 150, process_index=part, process_count=parts)
        texts = complete_texts(stream_of(rows["tokens"]))
        size = len(range(part, len(TRAIN), parts))
        for epoch in range(2):
            by_epoch[epoch] += texts[epoch * size : (epoch + 1) * size]
    for texts in by_epoch.values():
        assert sorted(texts) == sorted(TRAIN)


STEPS, BATCH, LENGTH = 420, 3, 50


def resumable(config, **kwargs):
    config = dataclasses.replace(config, shuffle_bytes=16 * LENGTH)
    return train_dataset(
        config, **({"batch_size": BATCH, "sequence_length": LENGTH, "seed": 5} | kwargs)
    )


@pytest.fixture(scope="session")
def walk(tiny):
    """The batches of more than two epochs, with the state before each."""
    iterator = iter(resumable(tiny))
    steps = []
    for _ in range(STEPS):
        steps.append((json.dumps(iterator.get_state()), next(iterator)))
    assert STEPS * BATCH * LENGTH > 2.1 * sum(len(text) + 1 for text in TRAIN)
    return steps


def assert_goes_on(iterator, walk, step, count=8):
    for state, expected in walk[step : step + count]:
        assert json.dumps(iterator.get_state()) == state
        batch = next(iterator)
        for name, array in expected.items():
            np.testing.assert_array_equal(batch[name], array)


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, STEPS - 1), before=st.integers(0, 12))
def test_resumes_from_any_step(tiny, walk, step, before):
    iterator = iter(resumable(tiny))
    for _ in range(before):
        next(iterator)
    iterator.set_state(json.loads(walk[step][0]))
    assert_goes_on(iterator, walk, step)


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 300),
    shuffle_bytes=st.integers(1, 40_000),
    step=st.integers(0, 150),
    part=st.integers(0, 2),
)
def test_resumes_with_any_settings(tiny, length, shuffle_bytes, step, part):
    config = dataclasses.replace(tiny, shuffle_bytes=shuffle_bytes)
    dataset = train_dataset(
        config, batch_size=2, sequence_length=length, seed=1, process_index=part, process_count=3
    )
    original, restored = iter(dataset), iter(dataset)
    for _ in range(step):
        next(original)
    restored.set_state(json.loads(json.dumps(original.get_state())))
    for _ in range(30):
        np.testing.assert_array_equal(next(original)["tokens"], next(restored)["tokens"])


def test_a_state_is_not_changed_by_going_on(tiny, walk):
    iterator = iter(resumable(tiny))
    state = iterator.get_state()
    for _ in range(20):
        next(iterator)
    iterator.set_state(state)
    assert_goes_on(iterator, walk, 0)


@pytest.mark.parametrize("step", [0, 1, 7, 300])
def test_resumes_through_orbax(tiny, walk, tmp_path, step):
    iterator = iter(resumable(tiny))
    for _ in range(step):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(step, args=args)
        next(iterator)
    restored = iter(resumable(tiny))
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        manager.restore(step, args=args)
    assert_goes_on(restored, walk, step)


def test_resumes_behind_a_prefetching_thread(tiny, walk):
    def prefetched():
        dataset = resumable(tiny)
        return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))

    iterator = prefetched()
    for _ in range(9):
        next(iterator)
    restored = prefetched()
    restored.set_state(json.loads(json.dumps(iterator.get_state())))
    assert_goes_on(restored, walk, 9)


def test_the_batch_size_may_change(tiny, walk):
    iterator = iter(resumable(tiny, batch_size=1))
    iterator.set_state(json.loads(walk[30][0]))
    expected = walk[30][1]["tokens"]
    np.testing.assert_array_equal([next(iterator)["tokens"][0] for _ in range(BATCH)], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"sequence_length": 49}, "sequence length was 50 and is 49"),
        ({"process_count": 2}, "part of the documents was '0 of 1' and is '0 of 2'"),
    ],
)
def test_a_state_of_other_rows_is_refused(tiny, walk, change, message):
    with pytest.raises(ValueError, match=message):
        iter(resumable(tiny, **change)).set_state(json.loads(walk[10][0]))


def test_a_state_of_another_data_set_is_refused(tiny, walk, library):
    with pytest.raises(ValueError, match=r"data set was 'tiny_texts/1.0.0' and is 'python_source/"):
        iter(resumable(library)).set_state(json.loads(walk[10][0]))


def test_targets_and_weights_of_a_row():
    tokens = np.array(
        [[BOS, 1, 2, BOS, BOS, 3, 0, 0], [7, BOS, 8, 9, 0, 0, 0, 0], [7, BOS, 8, 9, 0, 1, 2, 3]]
    )
    ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2]])
    expected = (
        tokens[:, :-1],
        ids[:, :-1],
        tokens[:, 1:],
        np.array([[1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]]),
    )
    actual = targets_and_weights(tokens, ids)
    traced = jax.jit(targets_and_weights)(tokens, ids)
    for arrays in (actual, traced):
        assert len(arrays) == 4
        assert arrays[3].dtype == np.float32
        for array, value in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(array, value)


def test_every_byte_is_a_training_target_once_an_epoch(tiny):
    tokens = sum(len(text) + 1 for text in TRAIN)
    rows = take(in_order(tiny), -(-(tokens - 1) // 50))
    *_, targets, weights = targets_and_weights(rows["tokens"], rows["segment_ids"])
    counted = targets[weights > 0][: sum(map(len, TRAIN))].astype(np.uint8).tobytes()
    texts = complete_texts(stream_of(take(in_order(tiny), tokens // 50 + 2)["tokens"]))
    assert counted == b"".join(texts[: len(TRAIN)])


@settings(deadline=None, max_examples=60)
@given(
    batch_size=st.integers(1, 5),
    length=st.integers(1, 40) | st.sampled_from([400, 3000]),
    max_bytes=st.none() | st.integers(0, 2000),
)
def test_evaluation_counts_every_byte_once(tiny, batch_size, length, max_bytes):
    batches = evaluation_batches(
        tiny, "test", batch_size=batch_size, sequence_length=length, max_bytes=max_bytes
    )
    stored = list(documents(tiny, "test"))
    wanted = b"".join(stored)[:max_bytes]
    counted = b""
    for batch in batches:
        assert batch["tokens"].shape == batch["segment_ids"].shape == (batch_size, length + 1)
        assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        assert batch["weights"].dtype == np.float32
        *_, targets, weights = targets_and_weights(batch["tokens"], batch["segment_ids"])
        np.testing.assert_array_equal(batch["weights"], weights)
        counted += targets[weights > 0].astype(np.uint8).tobytes()
        assert (batch["segment_ids"] > 0).any()
    assert counted == wanted


def test_evaluation_keeps_documents_apart(tiny):
    stored = list(documents(tiny, "test"))
    assert sorted(stored) == sorted(TEST)
    (batch,) = evaluation_batches(tiny, "test", batch_size=1, sequence_length=4000)
    (tokens,), (ids,) = batch["tokens"], batch["segment_ids"]
    for number, text in enumerate(stored, start=1):
        assert tokens[ids == number].tolist() == [BOS, *text]
    assert set(tokens[ids == 0]) == {0}
    assert ids.max() == len(stored) and VOCAB_SIZE == BOS + 1


@pytest.mark.parametrize("max_bytes", [0, 1, 5, 1299, 10**6, None])
def test_documents_end_at_max_bytes(tiny, max_bytes):
    everything = b"".join(documents(tiny, "test"))
    assert b"".join(documents(tiny, "test", max_bytes)) == everything[:max_bytes]


def test_parts_of_splits(tiny):
    parts = [set(documents(tiny, split)) for split in ("train[:25%]", "train[25%:]")]
    assert parts[0] | parts[1] == set(TRAIN)
    assert len(parts[0]) + len(parts[1]) == len(TRAIN)
    config = dataclasses.replace(tiny, train_split="train[:25%]")
    stream = stream_of(take(in_order(config), 500)["tokens"])
    assert set(complete_texts(stream)) == parts[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "tiny_text"}, ValueError, "no data set 'tiny_text'. Did you mean tiny_texts"),
        ({"name": "tiny_texts/en"}, ValueError, "name: 'tiny_texts/en': BuilderConfig en not"),
        ({"name": "tiny_texts:9.0.0"}, ValueError, "cannot be loaded at version 9.0.0"),
        ({"name": "?"}, ValueError, "name: '?'"),
        ({"text_feature": "text"}, ValueError, "its features are body (Text), label (ClassLabel)"),
        ({"text_feature": "label"}, ValueError, "'label' is no text feature of tiny_texts"),
        ({"train_split": "dev"}, ValueError, "has no 'dev' (Unknown split 'dev'"),
        ({"train_split": "train["}, ValueError, "it has train, test, and parts of them"),
        ({"name": "needy_texts"}, OSError, "Install what is missing (pip install apache_beam)"),
        ({"name": "large_texts"}, OSError, "No space left on device. Make room or"),
        ({"shuffle_bytes": 0}, ValueError, "shuffle_bytes: 0; it must be at least 1"),
    ],
)
def test_errors_of_the_data_set(tiny, changes, error, message):
    config = dataclasses.replace(tiny, **changes)
    with pytest.raises(error) as caught:
        train_dataset(config, batch_size=1, sequence_length=8, seed=0)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    config = TextDataConfig(data_dir=str(tmp_path / "file" / "data"))
    with pytest.raises(
        OSError, match=r"python_source cannot be prepared in .*choose another folder"
    ):
        documents(config, "test")


def test_no_network(tmp_path, monkeypatch):
    no_waiting = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(urllib3.util.retry, "time", no_waiting)
    retries = downloader.MAX_RETRIES
    config = TextDataConfig(name="downloaded_texts", data_dir=str(tmp_path))
    with pytest.raises(OSError, match=r"downloaded_texts cannot be prepared in .*needs a network"):
        documents(config, "test")
    assert downloader.MAX_RETRIES == retries


@pytest.mark.parametrize("damage", ["truncate", "info"])
def test_damaged_files(tmp_path, damage):
    config = TextDataConfig(name="tiny_texts", text_feature="body", data_dir=str(tmp_path))
    next(documents(config, "train"))
    (folder,) = tmp_path.glob("tiny_texts/*")
    if damage == "truncate":
        (file,) = folder.glob("*train.array_record*")
        os.truncate(file, 100)
    else:
        (folder / "dataset_info.json").unlink()
    with pytest.raises(OSError, match=r"is damaged .*; delete it, and it is prepared again"):
        next(documents(config, "train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0; it must be at least 1"),
        ({"sequence_length": 0}, "sequence_length: 0; it must be at least 1"),
        ({"seed": -1}, "seed: -1; it must be at least 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index: 2; it must be in 0\.\.1"),
        ({"process_count": len(TRAIN) + 1}, "documents in tiny_texts train are too few for"),
    ],
)
def test_errors_of_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_dataset(tiny, **({"batch_size": 1, "sequence_length": 8, "seed": 0} | arguments))


def test_errors_of_evaluation_come_at_once(tiny):
    with pytest.raises(ValueError, match="batch_size: 0"):
        evaluation_batches(tiny, "test", batch_size=0, sequence_length=8)
    with pytest.raises(ValueError, match="has no 'dev'"):
        evaluation_batches(tiny, "dev", batch_size=1, sequence_length=8)
