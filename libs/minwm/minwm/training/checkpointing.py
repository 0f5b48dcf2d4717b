"""Checkpoints: `checkpoints/step-000200/` with the state and, beside it, what it was made with.

A folder is written aside, flushed to the disk and renamed: one that has its name is complete. The last few are kept,
and the best one. A damaged one is passed over for the one before it, never for none. States are full: they know
nothing of the number of processes.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from minwm.errors import CheckpointError, TrainingError

_STATE, _ABOUT = "state.pt", "about.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The lowest held-out loss so far: after how many steps, and which."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state after `step` steps. made_with: what decided its numbers, by dotted name; values as JSON has them."""

    path: Path
    step: int
    made_with: Mapping[str, Any]
    best: Best | None
    state: dict[str, Any]

    def require(self, made_with: Mapping[str, Any]) -> None:
        """Raise TrainingError naming what was decided otherwise."""
        differing = [
            f"{name}={self.made_with.get(name)!r} where this run has {made_with.get(name)!r}"
            for name in sorted(self.made_with.keys() | made_with.keys())
            if self.made_with.get(name) != made_with.get(name)
        ]
        if differing:
            raise TrainingError(
                f"{self.path}: was made with {'; '.join(differing)}; use another folder, or go on from its weights "
                "with run.resume=weights"
            )


class Checkpoints:
    """The checkpoints of one run folder, the last `keep` of them and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder / "checkpoints", keep

    def save(self, step: int, state: Mapping[str, Any], made_with: Mapping[str, Any], best: Best | None) -> None:
        """Write the state after `step` steps; older checkpoints go, but for the best and the last few."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        partial = self._folder / f".{self._name(step)}.partial"
        partial.mkdir()
        _write(partial / _STATE, lambda file: torch.save(dict(state), file))
        about = {"step": step, "sha256": _sha256(partial / _STATE), "made_with": dict(made_with)}
        text = json.dumps({**about, "best": best and asdict(best)}, indent=1)
        _write(partial / _ABOUT, lambda file: file.write(text.encode()))
        _flush(partial)
        target = self._folder / self._name(step)
        if target.exists():  # a damaged one that was passed over
            self._remove(target)
        os.replace(partial, target)
        _flush(self._folder)
        kept = [s for s in self.steps() if s <= step][-self._keep :] + ([best.step] if best else [])
        for old in self.steps():
            if old < step and old not in kept:
                self._remove(self._folder / self._name(old))

    def steps(self) -> list[int]:
        """After which steps there is one, rising."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*"))

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole; None where there was never one. Raises TrainingError if all are damaged."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step)
            except CheckpointError as error:
                _log.warning("%s; trying the checkpoint before it", error)
        if steps:
            raise TrainingError(f"{self._folder}: all checkpoints are damaged, {steps}; use another folder")
        return None

    def read(self, step: int) -> Checkpoint:
        """The one after `step` steps, on the CPU. Raises CheckpointError when it is damaged."""
        path = self._folder / self._name(step)
        try:
            about = json.loads((path / _ABOUT).read_text())
            if _sha256(path / _STATE) != about["sha256"]:
                raise CheckpointError(f"{path}: damaged (the checksum of {_STATE} differs)")
            state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
            best = about["best"] and Best(**about["best"])
            return Checkpoint(path=path, step=about["step"], made_with=about["made_with"], best=best, state=state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: damaged ({error!r})") from error

    def _remove(self, path: Path) -> None:
        """Out of sight first: half a checkpoint is never seen under its name."""
        hidden = path.with_name(f".{path.name}.removed")
        os.replace(path, hidden)
        shutil.rmtree(hidden)

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob(".step-*"):
            shutil.rmtree(path)

    @staticmethod
    def _name(step: int) -> str:
        return f"step-{step:06d}"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, of dotted names; values as JSON gives them back."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in flat(value).items()}
        else:
            found[name] = json.loads(json.dumps(value, default=str))
    return found


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make renames inside a folder lasting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
