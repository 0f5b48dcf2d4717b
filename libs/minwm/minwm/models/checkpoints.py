"""Weights on disk: a folder with `model.safetensors` (or shards of it with an index) and `config.json`.

The configuration says what kind of model it is, how to build it, and where the weights came from.
Loading is strict: every missing, unexpected and misshapen key is listed. Tensors are read one at a time and written
shard by shard, so neither holds a second copy of a large model.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minwm.config import build
from minwm.errors import CheckpointError
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig, DecoderConfig, TinyDecoder
from minwm.models.sources import INDEX, Files, InMemory, Tensors, weight_files
from minwm.models.sources import read_json as read_json  # whoever knows our folders reads their JSON

STEM = "model"
WEIGHTS, CONFIG = f"{STEM}.safetensors", "config.json"
SHARD_BYTES = 5 * 10**9

Convolutional = TypeVar("Convolutional", Autoencoder, TinyDecoder)


def save_model(
    folder: Path,
    model: nn.Module,
    *,
    kind: str,
    config: object,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write weights and configuration aside, then rename: a folder that exists is complete.

    An existing folder is replaced. `about` is provenance: free-form, kept in `config.json`.
    """
    content = {"kind": kind, "config": asdict(config), "about": dict(about or {})}  # type: ignore[call-overload]
    write_folder(folder, InMemory(model.state_dict()), content, dtype=dtype)


def write_folder(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    *,
    stem: str = STEM,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors, cast to `dtype` if given, and `config.json`; aside first, then renamed.

    More than `shard_bytes` are split over several files, and at most that much is held in memory. Of an existing
    folder the weights and the configuration are replaced.
    """
    with _aside(folder, stem) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=1, default=str))
        _write_shards(partial, tensors, stem, dtype, shard_bytes)
        for path in partial.iterdir():
            shutil.copymode(partial / CONFIG, path)  # safetensors lets nobody but the owner read what it writes


@contextmanager
def _aside(folder: Path, stem: str) -> Iterator[Path]:
    """A folder to write to that becomes `folder` when all went well, and nothing otherwise."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            for old in (*folder.glob(f"{stem}.*"), *folder.glob(f"{stem}-*"), folder / CONFIG):
                old.unlink(missing_ok=True)
            for path in partial.iterdir():
                os.replace(path, folder / path.name)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, tensors: Tensors, stem: str, dtype: torch.dtype | None, limit: int) -> None:
    shards = _shards(tensors.shapes, dtype, limit)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _copy(tensors.read(name), dtype) for name in names}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_bytes(value, dtype) for value in tensors.shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=1))


def _shards(shapes: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    """Names in runs of at most `limit` bytes, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in shapes.items():
        bytes_ = _bytes(value, dtype)
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _bytes(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * _stored(value, dtype).itemsize


def _copy(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In memory of its own: tensors of a mapped file share theirs, which safetensors refuses to write."""
    return value.detach().to("cpu", _stored(value, dtype), copy=True, memory_format=torch.contiguous_format)


def _stored(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return value.dtype if dtype is None or not value.is_floating_point() else dtype


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """`config.json` of a model folder. Raises CheckpointError when absent, damaged or of another kind."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a model folder (it has no {CONFIG})")
    content = read_json(path)
    if content.get("kind") != kind:
        raise CheckpointError(f"{folder}: holds a {content.get('kind')!r}, expected a {kind!r}")
    if not isinstance(content.get("config"), dict):
        raise CheckpointError(f"{path}: has no configuration of the model, expected a mapping `config`")
    return content


def read_weights(folder: Path) -> Files:
    """The tensors of a model folder. Raises CheckpointError when they are absent or damaged."""
    index = folder / f"{STEM}{INDEX}"
    if not index.is_file() and not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}")
    return Files(weight_files(index if index.is_file() else folder / WEIGHTS))


def load_weights(model: nn.Module, folder: Path, missing_ok: Collection[str] = ()) -> None:
    """Load a folder's weights into the model, casting to the model's dtype. Strict; see load_tensors."""
    tensors = read_weights(folder)
    load_tensors(model, tensors, where=str(folder / WEIGHTS), missing_ok=missing_ok)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Tensors, where: str, missing_ok: Collection[str] = ()) -> None:
    """Copy tensors into the model, one at a time, cast to its dtypes; on the meta device, give them to it.

    What is in `missing_ok` may be absent and then stays as it is. Raises CheckpointError, listing every misfit and
    leaving the model as it was.
    """
    state = model.state_dict()
    check_fit(state, tensors.shapes, where, missing_ok)
    for name in tensors.shapes:
        if state[name].is_meta:
            _give(model, name, tensors.read(name).to(state[name].dtype, copy=True))
        else:
            state[name].copy_(tensors.read(name))


def _give(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)


def check_fit(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, missing_ok: Collection[str] = ()
) -> None:
    """Raise CheckpointError listing every missing (but for `missing_ok`), unexpected and misshapen key."""
    problems = misfits(expected, found, missing_ok)
    if problems:
        raise CheckpointError(f"{where}: does not fit the model: " + "; ".join(problems))


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], missing_ok: Collection[str] = ()) -> list[str]:
    """A line for every missing, unexpected and misshapen key; sorted."""
    problems = [f"missing {name}" for name in expected.keys() - found.keys() - set(missing_ok)]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} holds {found[name].dtype}, expected floating point"
        for name in expected.keys() & found.keys()
        if expected[name].is_floating_point() and not found[name].is_floating_point()
    ]
    return sorted(problems)


def save_autoencoder(folder: Path, model: Autoencoder, about: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder's folder."""
    save_model(folder, model, kind="autoencoder", config=model.config, about=about)


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder ready for inference, in the layout that is fast on CPUs' matrix units."""
    content = read_config(folder, "autoencoder")
    return _ready(Autoencoder(build(AutoencoderConfig, content["config"], f"{folder}/{CONFIG}")), folder, dtype)


def save_decoder(folder: Path, model: TinyDecoder, about: Mapping[str, Any] | None = None) -> None:
    """Write the folder of a decoder by itself."""
    save_model(folder, model, kind="decoder", config=model.config, about=about)


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """A decoder ready for inference, in the same layout."""
    content = read_config(folder, "decoder")
    return _ready(TinyDecoder(build(DecoderConfig, content["config"], f"{folder}/{CONFIG}")), folder, dtype)


def _ready(model: Convolutional, folder: Path, dtype: torch.dtype) -> Convolutional:
    load_weights(model, folder)
    return model.to(dtype=dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]
