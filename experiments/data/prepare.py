"""Data sets of TFDS, prepared on this machine if need be, and read without TensorFlow."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from experiments.data.digits import Digits
from experiments.data.python_source import PythonSource

_log = logging.getLogger(__name__)

OWN = PythonSource, Digits
"""Builders of this library, which need no network and take seconds."""
_LOCAL = "python_source (text) and digits (images) need no network"


def data_directory(given: str | None) -> str:
    """Returns where prepared data sets are kept: the argument, or else what the system says."""
    given = given or os.environ.get("TFDS_DATA_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.expanduser(given or os.path.join(cache, "attention_atlas", "tfds"))


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Finds a data set, and prepares it first if it is not in `data_dir` yet.

    Of several processes on a machine one prepares, and the others wait for it. What is
    prepared half (a killed process, a full disk) is never read.

    Args:
      name: a TFDS data set, with its configuration if it has several: wiki40b/en.
      data_dir: where prepared data sets are kept.

    Raises:
      ValueError: if there is no such data set or configuration.
      OSError: if the data set cannot be prepared or is damaged: no network, no space, a package
        that this data set needs and that is not installed.
    """
    builder = _prepared(name, data_dir)
    if not builder.info.splits:
        raise damaged(builder.data_dir, "dataset_info.json is missing")
    return builder


def examples(
    builder: tfds.core.DatasetBuilder, split: str
) -> tfds.core.data_sources.BaseDataSource:
    """Opens a split of a prepared data set.

    Raises:
      ValueError: if there is no such split.
    """
    try:
        return builder.as_data_source(split)
    except ValueError as error:
        raise ValueError(
            f"split: {builder.name} has no {split!r} ({brief(error)}); it has "
            f"{', '.join(builder.info.splits)}, and parts of them are written train[:95%]"
        ) from error


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
                f"{name} cannot be prepared in {data_dir}: {brief(error)}. {_advice(error)}"
            ) from error
    return builder


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if name.partition("/")[0] not in {own.name for own in OWN}:
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
            f"https://www.tensorflow.org/datasets/catalog/overview; {_LOCAL}"
        ) from error
    except OSError as error:
        raise OSError(f"{data_dir} cannot be read: {brief(error)}. {_advice(error)}") from error
    except Exception as error:  # also AssertionError, for a wrong version
        raise ValueError(f"name: {name!r}: {brief(error)}") from error


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
        if isinstance(builder, OWN):
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


def damaged(folder: str, why: object) -> OSError:
    """The error of a prepared data set that cannot be read."""
    return OSError(f"{folder} is damaged ({why}); delete it, and it is prepared again")


def brief(error: BaseException) -> str:
    """The first line of an error, without what TFDS puts around it."""
    text = str(error).rpartition('}": ')[2].partition(". Here are")[0]
    lines = text.strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _advice(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return (
            f"Install what is missing (pip install {_missing(error)}), or prepare the data set on "
            "another machine and copy its folder"
        )
    if type(error).__module__.startswith(("requests", "urllib3", "tensorflow_datasets")):
        return (
            "It is downloaded once, which needs a network; or copy the prepared folder from "
            f"another machine. {_LOCAL}"
        )
    return (
        "Make room or the rights to write there, or choose another folder: data_dir, $TFDS_DATA_DIR"
    )


def _missing(error: BaseException | None) -> str:
    """The package that could not be imported; TFDS hides its name behind errors of its own."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return "tensorflow"
