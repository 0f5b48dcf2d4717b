"""Where weights come from: files, folders and hub repositories, whose tensors are read one at a time.

A source is a path, or `owner/name[/folder]` on the Hugging Face hub. Of a folder only the transformer's weights
count: one file, or shards with an index. Files are mapped, not read, and only one of them at a time; pickles are
opened as weights only, so a file that holds code is refused.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minwm.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")  # what files of weights are called
SUFFIXES = (".safetensors", ".pt", ".pth")
INDEX = ".safetensors.index.json"
_INSIDE = ("generator_ema", "generator")  # a trained model.pt holds one or both; the average is the better one
_REPOSITORY = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<inside>[^/].*?))?/?")


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, Tensor]:
        """Stand-ins of the right shape and dtype; on the meta device where the values are not in memory."""

    def read(self, name: str) -> Tensor:
        """The values; the tensor may be a view of a mapped file."""


class InMemory:
    """Tensors that are there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = tensors

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        return self.shapes[name]


class Joined:
    """Tensors of two sources, whose names differ."""

    def __init__(self, first: Tensors, second: Tensors) -> None:
        self._first, self._second = first, second
        self.shapes: Mapping[str, Tensor] = {**first.shapes, **second.shapes}

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        return (self._first if name in self._first.shapes else self._second).read(name)


class Files:
    """The tensors of a checkpoint's files.

    Raises CheckpointError for files that are damaged, empty or no weights, and for a tensor that is there twice.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, Tensor] = {}
        self._path: dict[str, Path] = {}
        self._open: tuple[Path, Mapping[str, Tensor]] | None = None
        for path in paths:
            for name, tensor in self._opened(path).items():
                if name in self.shapes:
                    raise CheckpointError(f"{path}: {name} is in {self._path[name].name} too")
                self.shapes[name], self._path[name] = torch.empty_like(tensor, device="meta"), path
        if not self.shapes:
            raise CheckpointError(f"{', '.join(map(str, paths))}: holds no tensors")

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        return self._opened(self._path[name])[name].detach()

    def _opened(self, path: Path) -> Mapping[str, Tensor]:
        if self._open is None or self._open[0] != path:
            self._open = None  # lets go of one mapping before there is another
            self._open = path, (_Safetensors(path) if path.suffix == ".safetensors" else _unpickled(path))
        return self._open[1]


class _Safetensors(Mapping[str, Tensor]):
    """One file, mapped."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error
        self._names: list[str] = self._file.offset_keys()  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file that torch saved, mapped; of a training checkpoint the (averaged) generator's."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text tells how to load it all the same
        raise CheckpointError(f"{path}: refused, it is damaged or holds more than weights") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not saved by torch 1.6 or later ({_line(error)})") from error
    inside = next((name for name in _INSIDE if isinstance(content, dict) and name in content), None)
    state = content if inside is None else content[inside]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected tensors by name")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, expected tensors by name, or one of "
                f"{', '.join(_INSIDE)} with them"
            )
    return state


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def resolve(source: str, *, download: bool = False) -> list[Path]:
    """The files of a source's weights: a path's, or those of a repository on the hub.

    A repository is looked up in the hub's local cache; with `download` what is missing is fetched, weights and
    configuration of the transformer only. Raises CheckpointError, saying how to get the files, when there are none.
    """
    if Path(source).exists():
        return weight_files(Path(source))
    match = _REPOSITORY.fullmatch(source)
    if match is None:
        raise CheckpointError(
            f"{source}: no such file or folder, nor a repository's name (owner/name or owner/name/folder)"
        )
    repository, inside = match["repository"], match["inside"] or ""
    return weight_files(_snapshot(repository, inside, download) / inside)


def hub_patterns(inside: str) -> list[str]:
    """Which files of a repository are a transformer's: those of the folder, or the file, `inside` it."""
    if inside.endswith(SUFFIXES):
        return [inside]
    folders = [f"{inside}/" if inside else ""]
    folders += [f"{folder}transformer/" for folder in folders]
    return [
        f"{folder}{name}" for folder in folders for name in ("config.json", "model[.-]*", "diffusion_pytorch_model*")
    ]


def _snapshot(repository: str, inside: str, download: bool) -> Path:
    """The local folder of a repository's files."""
    patterns = hub_patterns(inside)
    folder = f"checkpoints/{repository}"
    included = " ".join(f"--include '{pattern}'" for pattern in patterns)
    advice = (
        f"put the files in place with\n  hf download {repository} {included} --local-dir {folder}\n"
        f"on a machine that reaches the hub (older versions: huggingface-cli download), and name "
        f"{folder}{'/' if inside else ''}{inside} instead"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repository}: needs huggingface-hub (pip install 'minwm[published]'), or {advice}"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=not download))
    except (OSError, ValueError) as error:
        fetch = "is no local path and not in the hub's cache; fetch it with --download, or"
        problem = f"cannot be fetched ({_line(error)});" if download else fetch
        raise CheckpointError(f"{repository}: {problem} {advice}") from error


def weight_files(path: Path) -> list[Path]:
    """The files of the weights in a folder (its own, or its `transformer`'s), of an index, or the file itself."""
    if path.is_file():
        if path.name.endswith(INDEX):
            return _shards(path)
        if path.suffix in SUFFIXES:
            return [path]
        raise CheckpointError(f"{path}: expected a file of weights ({', '.join(SUFFIXES)}) or an index (*{INDEX})")
    for stem in STEMS:
        if (path / f"{stem}{INDEX}").is_file():
            return _shards(path / f"{stem}{INDEX}")
        for suffix in SUFFIXES:
            if (path / f"{stem}{suffix}").is_file():
                return [path / f"{stem}{suffix}"]
    if (path / "transformer").is_dir():
        return weight_files(path / "transformer")
    names = ", ".join(f"{stem}{suffix}" for stem in STEMS for suffix in (".safetensors", INDEX, ".pt", ".pth"))
    folders = sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    beside = f"; it has folders {', '.join(folders)}" if folders else ""
    raise CheckpointError(f"{path}: holds no weights, expected one of {names}{beside}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in order; all of them have to be there."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{index}: names no files, expected a mapping `weight_map`")
    names = sorted({str(name) for name in named.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, expected files beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: names files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises CheckpointError when it is damaged or no mapping."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content
