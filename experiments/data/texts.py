"""The texts of any TFDS data set, by index; the data set is prepared on this machine if need be."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import io
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from experiments.data.python_source import PythonSource

_log = logging.getLogger(__name__)

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
            raise _damaged(self._folder, error) from error


def open_texts(name: str, split: str, *, feature: str, data_dir: str) -> TfdsTexts:
    """Opens a split of a data set, which is prepared first if it is not in `data_dir` yet.

    Of several processes on a machine one prepares, and the others wait for it. What is
    prepared half (a killed process, a full disk) is never read.

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
    builder = _prepared(name, data_dir)
    if not builder.info.splits:
        raise _damaged(builder.data_dir, "dataset_info.json is missing")
    features = dict(builder.info.features.items())
    if not isinstance(features.get(feature), tfds.features.Text):
        known = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
        raise ValueError(
            f"text_feature: {feature!r} is no text feature of {name}; its features are {known}"
        )
    try:
        examples = builder.as_data_source(split)
    except ValueError as error:
        raise ValueError(
            f"split: {name} has no {split!r} ({_brief(error)}); it has "
            f"{', '.join(builder.info.splits)}, and parts of them are written train[:95%]"
        ) from error
    return TfdsTexts(builder, examples, feature)


def _prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    builder = _find(name, data_dir)
    if _is_complete(builder):
        return builder
    try:
        with _alone(builder) as alone:
            builder = _find(name, data_dir)
            if not _is_complete(builder):
                _log.info("building %s in %s", builder.info.full_name, data_dir)
                _build(builder, alone)
    except Exception as error:  # TFDS, its downloads and its packages all have their own
        builder = _find(name, data_dir)
        if not _is_complete(builder):
            raise OSError(
                f"{name} cannot be prepared in {data_dir}: {_brief(error)}. {_advice(error)}"
            ) from error
    return builder


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if name.partition("/")[0] != PythonSource.name:
        # Registers wiki40b and others. TFDS's own look-up comes to these modules last, and stops
        # at the first one that needs a package which is not installed.
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorflow_datasets.text")
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.partition("/")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"name: TFDS has no data set {name!r}.{hint} They are listed at "
            "https://www.tensorflow.org/datasets/catalog/overview; python_source needs no network"
        ) from error
    except OSError as error:
        raise OSError(f"{data_dir} cannot be read: {_brief(error)}. {_advice(error)}") from error
    except Exception as error:  # also AssertionError, for a wrong version
        raise ValueError(f"name: {name!r}: {_brief(error)}") from error


def _is_complete(builder: tfds.core.DatasetBuilder) -> bool:
    # TFDS writes elsewhere, and renames what is finished.
    return builder.data_path.exists()


@contextlib.contextmanager
def _alone(builder: tfds.core.DatasetBuilder) -> Iterator[bool]:
    """Waits until no other process prepares the data set; False where that cannot be known."""
    folder = os.fspath(builder.data_dir_root)
    if "://" in folder:
        yield False
        return
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, f".{builder.name}.lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that builds %s", builder.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def _build(builder: tfds.core.DatasetBuilder, alone: bool) -> None:
    with contextlib.ExitStack() as stack:
        if isinstance(builder, PythonSource):
            if alone:
                for left_over in builder.data_path.parent.glob("incomplete.*"):
                    shutil.rmtree(left_over)
            # It takes seconds; TFDS's announcements and progress bars are for downloads.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.callback(tfds.enable_progress_bar)
            tfds.disable_progress_bar()
        else:
            # TFDS would wait 3.5 minutes for a network that is not there.
            stack.callback(setattr, downloader, "MAX_RETRIES", downloader.MAX_RETRIES)
            downloader.MAX_RETRIES = 5
        builder.download_and_prepare()


def _damaged(folder: str, why: object) -> OSError:
    return OSError(f"{folder} is damaged ({why}); delete it, and it is prepared again")


def _brief(error: BaseException) -> str:
    """The first line of an error, without what TFDS puts around it."""
    text = str(error).rpartition('}": ')[2].partition(". Here are")[0]
    lines = text.strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _advice(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return (
            f"Install what is missing (pip install {error.name}), or prepare the data set on "
            "another machine and copy its folder"
        )
    if type(error).__module__.startswith(("requests", "urllib3", "tensorflow_datasets")):
        return (
            "It is downloaded once, which needs a network; or copy the prepared folder from "
            "another machine. python_source needs no network"
        )
    return (
        "Make room or the rights to write there, or choose another folder: data_dir, $TFDS_DATA_DIR"
    )
