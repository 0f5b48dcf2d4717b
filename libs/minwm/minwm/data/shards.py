"""Datasets as WebDataset tar shards with a manifest: written once, then read-only.

A sample is a key and a few files (`000007.latents.npy`, `000007.json`); samples lie one after
another in `shard-00000.tar`, … The manifest counts and checksums the shards and carries what the
writer says of the whole. It is written last: a folder without one is not a dataset. Samples are read in
written order (`read_samples`) or by number (`ShardReader`).
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from minwm.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a dataset."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset holds. `kind` says which code reads it; `about` is the writer's own."""

    kind: str
    shards: tuple[Shard, ...]
    about: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def digest(self) -> str:
        """The dataset's identity: a hash of its shards' hashes and of what the writer says."""
        identity = [self.kind, [shard.sha256 for shard in self.shards], self.about]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ShardWriter:
    """Writes samples into tar shards of about `shard_bytes`; leaving the `with` block writes the manifest.

    An exception inside the block leaves no manifest, so a half-written folder is never taken for a dataset.
    """

    def __init__(self, folder: Path, kind: str, *, shard_bytes: int = 256 << 20) -> None:
        if (folder / MANIFEST).exists():
            raise DataError(f"{folder}: already holds a dataset; datasets are immutable, choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.about: dict[str, Any] = {}
        self._folder, self._kind, self._limit = folder, kind, shard_bytes
        self._shards: list[Shard] = []
        self._tar: tarfile.TarFile | None = None
        self._count = 0

    def add(self, key: str, files: dict[str, bytes]) -> None:
        """Append one sample. `key` must hold no dot; file names are extensions such as `latents.npy`."""
        if "." in key or "/" in key:
            raise DataError(f"sample key {key!r}: must hold neither dot nor slash")
        if self._tar is None:
            self._tar = tarfile.open(self._path() + ".tmp", "w")  # noqa: SIM115 (closed when the shard is full)
        for extension, content in files.items():
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))
        self._count += 1
        if self._tar.offset > self._limit:
            self._finish_shard()

    def _path(self) -> str:
        return str(self._folder / f"shard-{len(self._shards):05d}.tar")

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._path()
        os.replace(path + ".tmp", path)
        self._shards.append(
            Shard(
                name=Path(path).name,
                samples=self._count,
                bytes=os.path.getsize(path),
                sha256=_sha256(Path(path)),
            )
        )
        self._tar, self._count = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if self._tar is not None:
                self._tar.close()
                os.unlink(self._path() + ".tmp")
            return
        self._finish_shard()
        if not self._shards:
            raise DataError(
                f"{self._folder}: no sample was written; every clip was filtered out or the source is empty"
            )
        manifest = Manifest(kind=self._kind, shards=tuple(self._shards), about=self.about)
        partial = self._folder / (MANIFEST + ".tmp")
        partial.write_text(json.dumps(asdict(manifest), indent=1))
        os.replace(partial, self._folder / MANIFEST)


def read_manifest(folder: Path, kind: str) -> Manifest:
    """The manifest of the dataset in `folder`. Raises DataError when there is none of that kind."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: not a dataset (it has no {MANIFEST})")
    try:
        content = json.loads(path.read_text())
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        manifest = Manifest(shards=shards, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest this version can read ({error})") from error
    if manifest.kind != kind or manifest.version != FORMAT_VERSION:
        raise DataError(
            f"{path}: holds {manifest.kind!r} version {manifest.version}, expected {kind!r} version {FORMAT_VERSION}"
        )
    return manifest


def read_samples(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample (key, files by extension) in written order.

    Raises DataError naming the shard whose checksum differs from the manifest's.
    """
    for shard in read_manifest(folder, kind).shards:
        path = _checked(folder, shard)
        with path.open("rb") as file:
            for key, places in _index(path):
                yield key, {extension: _read(file, place) for extension, place in places.items()}


class ShardReader:
    """Samples by number, from any number of threads; what is in memory is an index of the tar headers.

    Raises DataError naming the shard that is missing or whose size, or checksum unless `verify` is off, differs from
    the manifest's.
    """

    def __init__(self, folder: Path, kind: str, *, verify: bool = True) -> None:
        self.manifest = read_manifest(folder, kind)
        paths = [_checked(folder, shard, verify) for shard in self.manifest.shards]
        self._samples = [(path, key, places) for path in paths for key, places in _index(path)]

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, number: int) -> str:
        """The sample's key."""
        return self._samples[number][1]

    def shard(self, number: int) -> Path:
        """The tar file that the sample lies in."""
        return self._samples[number][0]

    def read(self, number: int, without: Collection[str] = ()) -> dict[str, bytes]:
        """The sample's files by extension; those in `without` are not touched."""
        path, _, places = self._samples[number]
        with path.open("rb") as file:
            return {extension: _read(file, place) for extension, place in places.items() if extension not in without}


_Place = tuple[int, int]
"""Offset and size of a file inside a tar file, in bytes."""


def _checked(folder: Path, shard: Shard, verify: bool = True) -> Path:
    path = folder / shard.name
    if not path.is_file():
        raise DataError(f"{path}: is named in the manifest but missing")
    if path.stat().st_size != shard.bytes or (verify and _sha256(path) != shard.sha256):
        raise DataError(f"{path}: corrupt (its size or checksum differs from the manifest's)")
    return path


def _index(path: Path) -> Iterator[tuple[str, dict[str, _Place]]]:
    """Every sample's key, and where its files lie."""
    key, places = "", dict[str, _Place]()
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                entry_key, _, extension = entry.name.partition(".")
                if not entry.isfile():
                    raise DataError(f"{path}: {entry.name} is not a file")
                if entry_key != key and places:
                    yield key, places
                    places = {}
                key = entry_key
                places[extension] = (entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a tar file that can be read ({error})") from error
    if places:
        yield key, places


def _read(file: BinaryIO, place: _Place) -> bytes:
    offset, size = place
    file.seek(offset)
    return file.read(size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
