"""The training loop: data in a keyed order, stages, engines, checkpoints, a log. Knows no method.

A run folder holds `log.jsonl` (a line per step), `checkpoint.pt` (replaced whole every
`checkpoint_every` steps; starting the same run again goes on from it) and, at the end, `model/`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minwm.errors import ConfigError, TrainingError
from minwm.models.checkpoints import check_fit
from minwm.randomness import generator
from minwm.training.draw import Draw
from minwm.training.engine import Engine, EngineName, OptimizerConfig, make_engine
from minwm.training.stage import Stage

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long and how to run. A step sees `batch_size` samples, in `accumulation` equal parts."""

    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    bf16: bool = True
    engine: EngineName = "auto"
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        smallest = min(self.steps, self.batch_size, self.accumulation, self.checkpoint_every)
        if smallest < 1 or self.batch_size % self.accumulation:
            raise ConfigError(
                f"run: steps={self.steps}, batch_size={self.batch_size}, accumulation={self.accumulation}, "
                f"checkpoint_every={self.checkpoint_every}: "
                "expected positive numbers and a batch that divides into the parts"
            )


def train(
    stage: Stage,
    samples: Sequence[Any],
    run: RunConfig,
    optimizers: dict[str, OptimizerConfig],
    folder: Path,
    about: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Train `stage` on `samples` and export the result to `folder/model`.

    Raises TrainingError when a loss or a gradient is not finite; the checkpoint of the last good steps stays.
    """
    if not samples:
        raise TrainingError("the dataset has no samples to train on")
    if missing := stage.networks.keys() ^ optimizers.keys():
        raise ConfigError(f"optimizers: expected exactly {sorted(stage.networks)}, differs in {sorted(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    engines = {name: make_engine(run.engine, net, optimizers[name]) for name, net in stage.networks.items()}
    start = _resume(folder, stage, engines, run)
    order = _Order(run.seed, len(samples))
    started = time.monotonic()
    _keep_lines(folder / "log.jsonl", start)
    with (folder / "log.jsonl").open("a") as log:
        for step in range(start, run.steps):
            figures = _step(stage, engines, samples, order, run, optimizers, step)
            figures["seconds"] = round(time.monotonic() - started, 3)
            log.write(json.dumps({"step": step, **figures}) + "\n")
            log.flush()
            if progress is not None:
                progress(step + 1, run.steps, figures)
            if (step + 1) % run.checkpoint_every == 0 and step + 1 < run.steps:
                _save(folder, stage, engines, run, step + 1)
    _save(folder, stage, engines, run, run.steps)
    engine = ", ".join(sorted({engine.name for engine in engines.values()}))
    budget = {"steps": run.steps, "batch_size": run.batch_size, "engine": engine}
    stage.export(folder / "model", {**about, **budget})


def _step(
    stage: Stage,
    engines: dict[str, Engine],
    samples: Sequence[Any],
    order: "_Order",
    run: RunConfig,
    optimizers: dict[str, OptimizerConfig],
    step: int,
) -> dict[str, float]:
    """One update of each network whose turn it is; the figures to log."""
    figures: dict[str, float] = {}
    numbers = range(step * run.batch_size, (step + 1) * run.batch_size)
    part = run.batch_size // run.accumulation
    for turn in stage.turns(step):
        total = 0.0
        for first in range(0, run.batch_size, part):
            chosen = numbers[first : first + part]
            draw = Draw(run.seed, step, chosen)
            batch = stage.prepare([samples[order[n]] for n in chosen], draw)
            with torch.autocast("cpu", torch.bfloat16) if run.bf16 else nullcontext():
                loss, extra = stage.loss(turn, batch, draw)
            if not torch.isfinite(loss):
                raise TrainingError(f"step {step}: the loss of {turn} is {loss.item()}, samples {list(chosen)}")
            engines[turn].backward(loss / run.accumulation)
            total += loss.item() / run.accumulation
        norm = engines[turn].step(optimizers[turn].rate(step, run.steps))
        if not math.isfinite(norm):
            raise TrainingError(f"step {step}: the gradient of {turn} has norm {norm}, its loss was {total}")
        figures |= {f"{turn}_loss": total, f"{turn}_grad_norm": norm, **extra}
    stage.after_step(step)
    return figures


def _keep_lines(log: Path, count: int) -> None:
    """Cut a log, a line per step, after `count` lines: steps after the checkpoint are done, and logged, again."""
    if log.is_file():
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:count]))


class _Order:
    """An endless order of a dataset's samples, shuffled anew, by key, in every epoch."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self._count)
        if epoch != self._epoch:
            shuffled = torch.randperm(self._count, generator=generator(self._seed, epoch, "order"))
            self._epoch, self._order = epoch, shuffled
        return int(self._order[place])


def _save(folder: Path, stage: Stage, engines: dict[str, Engine], run: RunConfig, step: int) -> None:
    networks = {**stage.networks, **stage.frozen}
    state = {
        "step": step,
        "seed": run.seed,
        "networks": {name: net.state_dict() for name, net in networks.items()},
        "engines": {name: engine.state_dict() for name, engine in engines.items()},
    }
    partial = folder / "checkpoint.pt.tmp"
    torch.save(state, partial)
    os.replace(partial, folder / "checkpoint.pt")


def _resume(folder: Path, stage: Stage, engines: dict[str, Engine], run: RunConfig) -> int:
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["seed"] != run.seed:
        raise TrainingError(f"{path}: was made with seed {state['seed']}, this run has {run.seed}; use another folder")
    networks = {**stage.networks, **stage.frozen}
    if networks.keys() != state["networks"].keys():
        raise TrainingError(
            f"{path}: holds the networks {sorted(state['networks'])}, this run has {sorted(networks)}; "
            "use another folder"
        )
    for name, network in networks.items():
        check_fit(network.state_dict(), state["networks"][name], where=f"{path}, {name}")
        network.load_state_dict(state["networks"][name])
    for name, engine in engines.items():
        engine.load_state_dict(state["engines"][name])
    return int(state["step"])
