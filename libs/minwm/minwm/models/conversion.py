"""Published checkpoints looked at, turned into backbone folders of ours, and back into Diffusers'.

All of it streams: shapes are compared on the meta device before a value is read, and values pass through one
tensor at a time. A converted folder says in its `about` which files, by digest, it was made of.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minwm.config import build
from minwm.errors import CheckpointError
from minwm.models.backbones import KIND, new_branches, new_model
from minwm.models.checkpoints import (
    CONFIG,
    SHARD_BYTES,
    check_fit,
    misfits,
    read_config,
    read_json,
    read_weights,
    write_folder,
)
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.presets import WorldConfig, preset, preset_names
from minwm.models.published import absent_branches, as_diffusers, diffusers_config, read_published
from minwm.models.sources import Files, InMemory, Joined, resolve
from minwm.models.wan import WanConfig

BRANCH_SEED = 0  # of the random weights behind a new branch's zeros


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is.

    files: name, bytes and sha256 of each
    presets: by name, that it fits, or every key that keeps it from fitting, with runs of blocks drawn together
    """

    source: str
    format: str
    files: list[dict[str, Any]]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    presets: dict[str, str | list[str]]


def inspect(source: str, *, download: bool = False) -> Inspection:
    """Look at a path or repository. Raises CheckpointError for what holds no weights of a known format."""
    paths = resolve(source, download=download)
    found, ours = read_published(Files(paths), source)
    fits = {name: _fit(name, found.kind, ours.shapes) for name in preset_names()}
    return Inspection(
        source=source,
        format=f"backbone folder ({found.title} names)" if _is_ours(paths[0].parent) else found.title,
        files=_listed(paths),
        tensors=len(ours.shapes),
        parameters=sum(value.numel() for value in ours.shapes.values()),
        bytes=sum(value.numel() * value.dtype.itemsize for value in ours.shapes.values()),
        dtypes=dict(Counter(str(value.dtype).removeprefix("torch.") for value in ours.shapes.values())),
        presets=dict(sorted(fits.items(), key=lambda fit: _misfit(fit[1]))),
    )


def convert(
    source: str,
    config: WorldConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    add_conditions: bool = False,
    download: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a backbone folder of a configuration with a published checkpoint's weights, cast to `dtype` if given.

    With `add_conditions` branches that the checkpoint lacks are added, which start without effect; returns their keys.
    Raises CheckpointError for weights that do not fit, or a folder `out` that holds something.
    """
    name, kind = config.preset, config.architecture.kind
    _require_empty(out)
    paths = resolve(source, download=download)
    found, ours = read_published(Files(paths), source)
    if found.kind != kind:
        raise CheckpointError(
            f"{source}: looks like {found.title} (backbone {found.kind}), expected weights for {name} (backbone {kind})"
        )
    _require_same_numbers(paths[0].parent, config)
    expected = _shapes(config.architecture)
    absent = absent_branches(expected, ours.shapes)
    problems = misfits(expected, ours.shapes, missing_ok=absent if add_conditions else ())
    if problems:
        addable = not add_conditions and len(problems) == len(absent)
        hint = "; branches that a base model lacks are added with --add-conditions" if addable else ""
        raise CheckpointError(f"{source}: does not fit {name}: {'; '.join(problems)}{hint}")
    added = new_branches(config.architecture, absent, BRANCH_SEED, next(iter(ours.shapes.values())).dtype)
    about = {"source": source, "format": found.title, "files": _listed(paths), "added": drawn_together(absent)}
    content = {"kind": KIND, "config": asdict(config), "about": about}
    write_folder(out, Joined(ours, InMemory(added)), content, dtype=dtype, shard_bytes=shard_bytes)
    return absent


def export_diffusers(
    folder: Path, out: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a backbone folder as Diffusers' class reads it.

    Raises CheckpointError for a folder that is no backbone's or has conditions, which Diffusers' classes don't know.
    """
    _require_empty(out)
    values = read_config(folder, KIND)["config"]
    stored = build(_Stored, {"architecture": values.get("architecture")}, f"{folder}/{CONFIG}")
    tensors = read_weights(folder)
    check_fit(_shapes(stored.architecture), tensors.shapes, where=str(folder))
    theirs = as_diffusers(tensors, stored.architecture, where=str(folder))
    config = diffusers_config(stored.architecture)
    write_folder(out, theirs, config, stem="diffusion_pytorch_model", dtype=dtype, shard_bytes=shard_bytes)


@dataclass(frozen=True)
class _Stored:
    architecture: WanConfig | HunyuanConfig


def _is_ours(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("kind") == KIND


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not empty, expected a new folder")


_FREE = ("_class_name", "target_size", "task_type", "rope_max_seq_len")  # no say in what the weights compute


def _require_same_numbers(folder: Path, config: WorldConfig) -> None:
    """Compare what shapes don't show (heads, rotary axes) with the configuration that Diffusers puts beside weights."""
    theirs = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" not in theirs:
        return
    wanted = diffusers_config(config.architecture)
    differing = [
        f"{key} is {theirs[key]}, expected {wanted[key]}"
        for key in sorted(wanted.keys() & theirs.keys() - set(_FREE))
        if theirs[key] != wanted[key]
    ]
    if differing:
        raise CheckpointError(f"{folder / CONFIG}: is not {config.preset}: {'; '.join(differing)}")


def _shapes(architecture: WanConfig | HunyuanConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return new_model(architecture).state_dict()


def _listed(paths: Sequence[Path]) -> list[dict[str, Any]]:
    files = []
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return files


def _fit(name: str, kind: str, found: Mapping[str, Tensor]) -> str | list[str]:
    architecture = preset(name).architecture
    if architecture.kind != kind:
        return f"is another backbone ({architecture.kind})"
    expected = _shapes(architecture)
    absent = absent_branches(expected, found)
    problems = misfits(expected, found)
    if not problems:
        return "fits"
    if len(problems) == len(absent):
        return f"fits with --add-conditions, which adds {', '.join(drawn_together(absent))}"
    return drawn_together(problems)


def _misfit(fit: str | list[str]) -> int:
    """For sorting: what fits first, then by how much is wrong, other backbones last."""
    if isinstance(fit, list):
        return len(fit)
    return 0 if fit.startswith("fits") else sys.maxsize


_BLOCK = re.compile(r"(?<=blocks\.)\d+")


def drawn_together(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the block's number only, as one with the runs of numbers: `blocks.{0..29}.norm3.bias`."""
    numbers: dict[str, list[int]] = {}
    for line in lines:
        numbers.setdefault(_BLOCK.sub("#", line, count=1), []).extend(int(n) for n in _BLOCK.findall(line)[:1])
    return [template.replace("#", _runs(found), 1) if found else template for template, found in numbers.items()]


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    written = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return "{" + ",".join(written) + "}" if len(numbers) > 1 else written[0]
