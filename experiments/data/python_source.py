"""A data set that every machine has: the source of Python's own standard library."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds

# Programs and prose. Left out are tables that machines made and people do not read: .decTest,
# .json (one of them is 400 KB of numbers), .pem, .xml, .types.
SUFFIXES = frozenset(
    ".py .pyi .pyw .c .cpp .h .sh .csh .fish .bat .ps1".split()
    + ".txt .rst .md .html .css .toml .cfg .ini".split()
)
# What others installed, what was compiled, and what names the machine that Python was built on.
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "lib-dynload", "config-")
SKIPPED_FILES = ("_sysconfigdata",)

HELD_OUT = 0.03
"""Share of the bytes that validation and test get, each."""

# Shorter lines (imports, returns, braces) are the same in files that have nothing else in common.
_LINE_BYTES = 20
# Files are near duplicates when they share this many lines, and this part of the smaller one's.
_SHARED_LINES = 3
_SHARED_PART = 0.2


def standard_library() -> tuple[str, ...]:
    """Folders of the running interpreter's standard library (of its base, in an environment)."""
    base = {
        "base": sys.base_prefix,
        "installed_base": sys.base_prefix,
        "platbase": sys.base_exec_prefix,
        "installed_platbase": sys.base_exec_prefix,
    }
    paths = (sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib"))
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths))


def read_files(roots: tuple[str, ...]) -> dict[str, bytes]:
    """The text files below some folders.

    A file counts as text if it has one of `SUFFIXES`, is not empty, and is UTF-8 without NUL.

    Returns:
      contents by path relative to its folder (with /), sorted by path.

    Raises:
      ValueError: if there is none.
    """
    files = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(SKIPPED_FOLDERS)]
            for name in names:
                path = Path(folder, name)
                if (
                    path.suffix in SUFFIXES
                    and not name.startswith(SKIPPED_FILES)
                    and path.is_file()
                ):
                    content = path.read_bytes()
                    if _is_text(content):
                        files.setdefault(path.relative_to(root).as_posix(), content)
    if not files:
        raise ValueError(
            f"python_source: no text files in {', '.join(roots)}; this Python comes without the "
            "source of its standard library. Use one from python.org, pyenv, conda or your system"
        )
    return dict(sorted(files.items()))


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return bool(content) and b"\0" not in content


def fingerprint(roots: tuple[str, ...]) -> str:
    """A name for the text below some folders, such as cpython-3.12.1-0f9a62c1d7b3.

    It has the interpreter's version, for the reader, and a hash of all paths and contents.
    """
    digest = hashlib.blake2b(digest_size=6)
    for path, content in read_files(roots).items():
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    version = f"{sys.implementation.name}-{platform.python_version()}"
    return f"{version}-{digest.hexdigest()}"


def split_files(files: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Divides files into train, validation and test, so that no split has what another one has.

    Of files with the same content the first is kept. Near duplicates (`near_duplicates`) stay
    together. Groups are drawn in the order of a hash of their first path: into test until it has
    its share of the bytes, then into validation; the rest is train. A group of more than half a
    share (a family of tables, one very large file) goes to train, as it would be most of a split.
    Nothing depends on the order of the argument.

    Args:
      files: contents by path.

    Returns:
      paths by name of split, in the order train, validation, test; sorted within a split.

    Raises:
      ValueError: if there are too few files to fill three splits.
    """
    first_with: dict[bytes, str] = {}
    for path in sorted(files):
        first_with.setdefault(files[path], path)
    unique = {path: content for content, path in first_with.items()}
    share = HELD_OUT * sum(map(len, unique.values()))

    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    sizes = dict.fromkeys(splits, 0)
    for group in sorted(near_duplicates(unique), key=lambda group: _hash(group[0])):
        size = sum(len(unique[path]) for path in group)
        small = size <= share / 2
        open_splits = [name for name in ("test", "validation") if small and sizes[name] < share]
        name = open_splits[0] if open_splits else "train"
        splits[name] += group
        sizes[name] += size
    if not all(splits.values()):
        raise ValueError(
            f"python_source: {len(unique)} different files are too few for three splits"
        )
    return {name: sorted(paths) for name, paths in splits.items()}


def near_duplicates(files: Mapping[str, bytes]) -> list[list[str]]:
    """Groups files that share a large part of their lines.

    Compared are the sets of lines of at least 20 bytes, without their indentation. Two files
    belong together if they share at least 3 lines and a fifth of the lines of the one that has
    fewer; and with each the files that belong to it.

    Args:
      files: contents by path.

    Returns:
      every path in one group; each group sorted, and the groups by their first path.
    """
    paths = sorted(files)
    files_with_line: dict[bytes, list[int]] = collections.defaultdict(list)
    num_lines = []
    for index, path in enumerate(paths):
        lines = {line.strip() for line in files[path].splitlines()}
        lines = {line for line in lines if len(line) >= _LINE_BYTES}
        num_lines.append(len(lines))
        for line in lines:
            files_with_line[line].append(index)

    shared: collections.Counter[tuple[int, int]] = collections.Counter()
    for indices in files_with_line.values():
        shared.update(itertools.combinations(indices, 2))

    group = list(range(len(paths)))

    def find(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for (a, b), count in shared.items():
        if count >= _SHARED_LINES + _SHARED_PART * min(num_lines[a], num_lines[b]):
            a, b = sorted((find(a), find(b)))
            group[b] = a

    groups: dict[int, list[str]] = collections.defaultdict(list)
    for index, path in enumerate(paths):
        groups[find(index)].append(path)
    return list(groups.values())


def _hash(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=8).digest()


@dataclasses.dataclass(eq=False)
class PythonSourceConfig(tfds.core.BuilderConfig):
    """Which files the data set is made of; its `name` is their fingerprint."""

    roots: tuple[str, ...] = ()
    """Folders whose text files are taken."""

    @classmethod
    def of(cls, *roots: str | os.PathLike[str]) -> PythonSourceConfig:
        """The configuration for some folders."""
        folders = tuple(map(os.fspath, roots))
        return cls(
            name=fingerprint(folders),
            description=f"Python {platform.python_version()}",
            roots=folders,
        )


@functools.cache
def _running_interpreter() -> PythonSourceConfig:
    return PythonSourceConfig.of(*standard_library())


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `python_source`: the text files of the running interpreter's library.

    An example has `path` (relative to the library) and `text` (the file, bytes). Splits: train,
    validation, test, about 94, 3 and 3 % of the bytes, see `split_files`. The records depend on
    the files alone: the same Python gives the same bytes, on any machine. Nothing is downloaded.

    The builder's configuration is named by the fingerprint of the files, so what was made of one
    Python is never read as another one's; `python_source/FINGERPRINT` still reads it, by name.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (declared so by TFDS)
    # Nothing is downloaded, so there are no checksums to look for beside this file.
    url_infos = None

    def get_default_builder_config(self) -> PythonSourceConfig:
        """The running interpreter's. A method, as reading the files must wait until it is asked."""
        return _running_interpreter()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text files of the standard library of the Python that runs.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/library/",
            license="PSF-2.0",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, str | bytes]]]]:
        del dl_manager
        files = read_files(self.builder_config.roots)
        return {
            name: self._generate_examples({path: files[path] for path in paths})
            for name, paths in split_files(files).items()
        }

    def _generate_examples(
        self, files: Mapping[str, bytes]
    ) -> Iterator[tuple[str, dict[str, str | bytes]]]:
        for path, content in files.items():
            yield path, {"path": path, "text": content}
