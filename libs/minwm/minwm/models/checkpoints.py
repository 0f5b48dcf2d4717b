"""Weights on disk: a folder with `model.safetensors` and `config.json`.

The configuration says what kind of model it is, how to build it, and where the weights came from.
Loading is strict: every missing, unexpected and misshapen key is listed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minwm.config import build
from minwm.errors import CheckpointError
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


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
    weights = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(weights, partial / WEIGHTS)
    (partial / CONFIG).write_text(json.dumps(content, indent=1, default=str))
    if folder.exists():
        for name in (WEIGHTS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
        partial.rmdir()
    else:
        os.replace(partial, folder)


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


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises CheckpointError when it is damaged or no mapping."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into the model, casting to the model's dtype. Strict."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    check_fit(model.state_dict(), weights, where=str(path))
    model.load_state_dict(weights)


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError listing every missing, unexpected and misshapen key."""
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the model: " + "; ".join(sorted(problems)))


def save_autoencoder(folder: Path, model: Autoencoder, about: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder's folder."""
    save_model(folder, model, kind="autoencoder", config=model.config, about=about)


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder ready for inference, in the layout that is fast on CPUs' matrix units."""
    content = read_config(folder, "autoencoder")
    model = Autoencoder(build(AutoencoderConfig, content["config"], f"{folder}/{CONFIG}"))
    load_weights(model, folder)
    return model.to(dtype=dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]
