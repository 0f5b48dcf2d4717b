"""The artifact store: bytes, files and folders under keys with slashes, in a directory.

Artifacts are immutable: what a key holds is changed only where `replace=True` says so, and storing equal
content again is no change. An artifact is written aside and then renamed, so a reader sees all of it or nothing.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from minwm.errors import ArtifactError

_ASIDE = ".partial"  # first part of no key: what is being written


class ArtifactStore(Protocol):
    """What an artifact store does, whatever holds the bytes.

    A key is parts with slashes between them, such as `models/doom/card.md`; a prefix is the first parts of
    keys. Every method raises ArtifactError, naming key and store, for a key that is malformed or missing,
    for a change of an immutable artifact, and when the store fails.
    """

    def put_bytes(self, key: str, content: bytes, *, replace: bool = False) -> None:
        """Store `content`. Of several writers of different content without `replace`, one succeeds."""

    def get_bytes(self, key: str) -> bytes:
        """The content of `key`."""

    def put_file(self, key: str, path: Path, *, replace: bool = False) -> None:
        """Store a file's content, as `put_bytes`."""

    def get_file(self, key: str, path: Path) -> Path:
        """Write the content of `key` to the file `path`, replacing it; returns `path`."""

    def put_folder(self, prefix: str, folder: Path) -> None:
        """Store all files below `folder` as `prefix/…`. Refused where `prefix` holds anything else."""

    def get_folder(self, prefix: str, folder: Path) -> Path:
        """Write all keys under `prefix` as files of the new or empty `folder`; returns `folder`."""

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """All keys under `prefix`, sorted; none when there is nothing."""

    def exists(self, key: str) -> bool:
        """Whether `key` holds an artifact."""


class DirectoryStore:
    """An `ArtifactStore` in the directory `root`, which is made when first written to."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put_bytes(self, key: str, content: bytes, *, replace: bool = False) -> None:
        """Store `content`."""
        self._put(key, lambda aside: aside.write_bytes(content), replace)

    def get_bytes(self, key: str) -> bytes:
        """The content of `key`."""
        with self._failures(key):
            return self._existing(key).read_bytes()

    def put_file(self, key: str, path: Path, *, replace: bool = False) -> None:
        """Store a file's content."""
        self._put(key, lambda aside: shutil.copyfile(path, aside), replace)

    def get_file(self, key: str, path: Path) -> Path:
        """Write the content of `key` to the file `path`, replacing it."""
        with self._failures(key), _aside(path.parent) as aside:
            copy = shutil.copyfile(self._existing(key), aside / "file")
            os.replace(copy, path)
        return path

    def put_folder(self, prefix: str, folder: Path) -> None:
        """Store all files below `folder` as `prefix/…`, all at once."""
        target, digest = self._path(prefix), folder_digest(folder)
        for path in _files(folder):
            self._path(f"{prefix}/{path.relative_to(folder).as_posix()}")
        with self._failures(prefix), _aside(self._root / _ASIDE) as aside:
            if not self.list(prefix):
                copy = shutil.copytree(folder, aside / "folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    copy.rename(target)
                except OSError:
                    if not self.list(prefix):  # else somebody was quicker: is theirs equal?
                        raise
            if folder_digest(target) != digest:
                raise ArtifactError(
                    f"{prefix}: {self._root} already holds other content there; artifacts are immutable"
                )

    def get_folder(self, prefix: str, folder: Path) -> Path:
        """Write all keys under `prefix` as files of the new or empty `folder`."""
        source = self._path(prefix)
        if not self.list(prefix):
            raise ArtifactError(f"{prefix}: no such folder in {self._root}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtifactError(f"{folder}: already exists, expected a new or empty folder to put {prefix} in")
        with self._failures(prefix), _aside(folder.parent) as aside:
            shutil.copytree(source, aside / "folder").rename(folder)
        return folder

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """All keys under `prefix`, sorted."""
        start = self._path(prefix) if prefix else self._root
        keys = (path.relative_to(self._root) for path in _files(start))
        return tuple(sorted(key.as_posix() for key in keys if key.parts[0] != _ASIDE))

    def exists(self, key: str) -> bool:
        """Whether `key` holds an artifact."""
        return self._path(key).is_file()

    def _path(self, key: str) -> Path:
        """The file of a key, if the key is well formed and stays inside the root."""
        parts = key.split("/")
        if not key.isprintable() or "\\" in key or {"", ".", ".."} & {*parts} or parts[0] == _ASIDE:
            raise ArtifactError(
                f"{key!r}: not a key of {self._root}; expected printable parts with slashes between them, "
                f"none of them empty, '.' or '..', nor {_ASIDE!r} the first"
            )
        path = self._root / key
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise ArtifactError(f"{key!r}: leads out of {self._root}")
        return path

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise ArtifactError(f"{key}: no such artifact in {self._root}")
        return path

    def _put(self, key: str, write: Callable[[Path], object], replace: bool) -> None:
        target = self._path(key)
        with self._failures(key), _aside(self._root / _ASIDE) as aside:
            new = aside / "file"
            write(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            if replace:
                os.replace(new, target)
                return
            try:
                os.link(new, target)  # as a rename, but fails where the target exists
            except FileExistsError as error:
                if not target.is_file() or _sha256(target) != _sha256(new):
                    raise ArtifactError(
                        f"{key}: {self._root} already holds other content there; artifacts are immutable"
                    ) from error

    @contextmanager
    def _failures(self, key: str) -> Iterator[None]:
        """What the file system refuses (no space, no permission, a file where a folder must be) is ours to tell."""
        try:
            yield
        except OSError as error:
            raise ArtifactError(f"{key}: {self._root} failed ({error})") from error


def folder_digest(folder: Path) -> str:
    """The identity of a folder's content: a sha256 over the paths and contents of all files below it.

    Raises ArtifactError when there are none, or one cannot be read.
    """
    digest = hashlib.sha256()
    files = sorted((path.relative_to(folder).as_posix(), path) for path in _files(folder))
    if not files:
        raise ArtifactError(f"{folder}: holds no files, expected a folder with an artifact's files")
    for name, path in files:
        try:
            digest.update(f"{_sha256(path)} {name}\n".encode())
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error})") from error
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _aside(parent: Path) -> Iterator[Path]:
    """A folder to write in, on the same file system as what is to be renamed into `parent`'s tree."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=".partial-") as folder:
        yield Path(folder)
