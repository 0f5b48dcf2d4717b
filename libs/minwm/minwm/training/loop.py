"""The training loop: data in a keyed order, stages, engines, checkpoints, figures. Knows no method.

A run folder holds `log.jsonl` (a line per step), `checkpoints/` and, at the end, `model/`. Starting the same run again
goes on from its newest whole checkpoint, to the same end bit for bit.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.errors import ConfigError, TrainingError
from minwm.models.checkpoints import check_fit
from minwm.models.transformer import Transformer
from minwm.training.average import gathered
from minwm.training.checkpointing import Best, Checkpoint, Checkpoints, flat
from minwm.training.engine import Engine, OptimizerConfig, make_engine
from minwm.training.heldout import HeldOut
from minwm.training.loader import Loader, MicroBatch, Samples, on_device
from minwm.training.metrics import Figures, Journal, Pace, Work
from minwm.training.parallel import Processes
from minwm.training.run import RunConfig
from minwm.training.stage import Stage

BAD_BATCH = "bad-batch.pt"
Progress = Callable[[int, int, dict[str, float]], None]
"""Told after every step, on the main process: steps done, of how many, and the step's figures."""


def train(
    stage: Stage,
    samples: Samples,
    run: RunConfig,
    optimizers: dict[str, OptimizerConfig],
    folder: Path,
    about: dict[str, Any],
    progress: Progress | None = None,
    *,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    heldout: Samples = (),
    identity: Mapping[str, Any] | None = None,
    work: Work | None = None,
) -> None:
    """Train `stage` on `samples` and export the result to `folder/model`.

    processes: that train together; left at the end
    identity: what else decides the run's numbers (stage, dataset, method): a checkpoint that was made with another one
        is refused with a TrainingError that names the difference
    work:     of a step, for the speed figures

    Raises TrainingError when a loss or a gradient is not finite: the checkpoints of good steps stay, and
    `folder/bad-batch.pt` holds the batch.
    """
    if not len(samples):
        raise TrainingError("the dataset has no samples to train on")
    if missing := stage.networks.keys() ^ optimizers.keys():
        raise ConfigError(f"optimizers: expected exactly {sorted(stage.networks)}, differs in {sorted(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    made_with = flat(
        {"run": run.decides(processes.device), "optimizers": {n: asdict(o) for n, o in optimizers.items()}}
    )
    made_with |= flat(identity or {})
    checkpoints = Checkpoints(folder, run.keep)
    with ExitStack() as stack:
        stack.callback(processes.close)
        check = HeldOut(stage, heldout, run, processes) if run.validate_every else None
        trainer = _Trainer(stage, run, optimizers, folder, processes)
        start, best = trainer.begin(checkpoints.newest(), made_with)
        batches = stack.enter_context(Loader(stage, samples, run, processes)).steps(start)
        journal = stack.enter_context(Journal(folder, run, start)) if processes.is_main else None
        pace = Pace(run, work, processes.device, processes.world)
        for done in range(start + 1, run.steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            figures = trainer.step(done - 1, batch)
            better = _checked(check, done, figures, best) if check and done % run.validate_every == 0 else None
            best = better or best
            figures.pace.update(pace.of_step(waited))
            if journal is not None:
                journal.write(done - 1, figures)
                if progress is not None:
                    progress(done, run.steps, figures.flat())
            if better or done % run.checkpoint_every == 0 or done == run.steps:
                state = trainer.state()
                if journal is not None:
                    journal.flush()
                    checkpoints.save(done, state, made_with, best)
                processes.barrier()
        if run.export == "best" and best is not None:
            trainer.load_networks(checkpoints.read(best.step))
        budget = {"steps": run.steps, "batch_size": run.batch_size, "engine": trainer.engine}
        with gathered(*stage.networks.values(), *stage.frozen.values()):
            if processes.is_main:
                stage.export(folder / "model", {**about, **budget})
        processes.barrier()


def _checked(check: HeldOut, done: int, figures: Figures, best: Best | None) -> Best | None:
    """Add the held-out losses to the figures; the new best if the first network's is the lowest so far."""
    losses = check.losses()
    for name, loss in losses.items():
        figures.networks.setdefault(name, {})["heldout_loss"] = loss
    loss = next(iter(losses.values()))
    return Best(step=done, loss=loss) if loss < (best.loss if best else math.inf) else None


class _Trainer:
    """The networks under their engines: a step, and the state between steps."""

    def __init__(
        self,
        stage: Stage,
        run: RunConfig,
        optimizers: Mapping[str, OptimizerConfig],
        folder: Path,
        processes: Processes,
    ) -> None:
        self._stage, self._run, self._optimizers = stage, run, optimizers
        self._folder, self._processes = folder, processes
        self._networks = {**stage.networks, **stage.frozen}
        self._engines: dict[str, Engine] = {}

    def begin(self, checkpoint: Checkpoint | None, made_with: Mapping[str, Any]) -> tuple[int, Best | None]:
        """Make the engines, from a checkpoint's state if there is one: the steps it has done, and the best of them."""
        exact = checkpoint is not None and checkpoint.made_with == made_with
        if checkpoint is not None:
            if not exact and self._run.resume == "exact":
                checkpoint.require(made_with)
            if checkpoint.step > self._run.steps:
                raise TrainingError(f"{checkpoint.path}: has done more than run.steps={self._run.steps}")
            self.load_networks(checkpoint)
        for network in (*self._networks.values(), *self._stage.fixed.values()):
            network.to(self._processes.device)
            if isinstance(network, Transformer):
                network.checkpoint_activations = self._run.checkpoint_activations
                if self._run.compile:
                    _compile_blocks(network)
        for name, network in self._stage.networks.items():
            config = self._optimizers[name]
            self._engines[name] = make_engine(self._run.engine, network, config, self._run.parallel, self._processes)
        if checkpoint is None:
            return 0, None
        if not exact:
            return checkpoint.step, None
        for name, engine in self._engines.items():
            engine.load_state_dict(checkpoint.state["engines"][name])
        return checkpoint.step, checkpoint.best

    def load_networks(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's weights. Raises TrainingError or CheckpointError when they are of other networks."""
        found = checkpoint.state["networks"]
        if self._networks.keys() != found.keys():
            raise TrainingError(
                f"{checkpoint.path}: holds the networks {sorted(found)}, this run has {sorted(self._networks)}; "
                "use another folder"
            )
        for name, network in self._networks.items():
            check_fit(network.state_dict(), found[name], where=f"{checkpoint.path}, {name}")
            network.load_state_dict(found[name])

    @property
    def engine(self) -> str:
        """What trained the networks, for people."""
        return ", ".join(sorted({engine.name for engine in self._engines.values()}))

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; asked on every process."""
        trained = {name: engine.weights() for name, engine in self._engines.items()}
        frozen = {name: network.state_dict() for name, network in self._stage.frozen.items()}
        engines = {name: engine.state_dict() for name, engine in self._engines.items()}
        return {"networks": {**trained, **frozen}, "engines": engines}

    def step(self, step: int, parts: list[MicroBatch]) -> Figures:
        """One update of each network whose turn it is."""
        contents = [on_device(part.content, self._processes.device) for part in parts]
        figures = Figures()
        for turn in self._stage.turns(step):
            figures.networks[turn], own = self._update(turn, step, parts, contents)
            figures.stage.update(own)
        self._stage.after_step(step)
        return figures

    def _update(
        self, turn: str, step: int, parts: list[MicroBatch], contents: list[Any]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The figures of the network and the stage's own: means over the parts and the processes."""
        total, own = 0.0, dict[str, float]()
        for part, content in zip(parts, contents, strict=True):
            with self._run.precision(self._processes.device):
                loss, extra = self._stage.loss(turn, content, part.draw)
            if not torch.isfinite(loss):
                raise self._stopped(turn, step, [part], f"the loss of {turn} is {loss.item()}")
            self._engines[turn].backward(loss / len(parts))
            total += loss.item() / len(parts)
            for name, value in extra.items():
                own[name] = own.get(name, 0.0) + value / len(parts)
        rate = self._optimizers[turn].rate(step, self._run.steps)
        norm = self._engines[turn].step(rate)
        if not math.isfinite(norm):
            raise self._stopped(turn, step, parts, f"the gradient of {turn} has norm {norm}, its loss was {total}")
        mean = self._processes.mean
        network = {"loss": mean(total), "grad_norm": norm, "learning_rate": rate}
        return network, {name: mean(value) for name, value in own.items()}

    def _stopped(self, turn: str, step: int, parts: list[MicroBatch], what: str) -> TrainingError:
        """The error that ends the run; what it happened on is kept in the run folder."""
        path = self._folder / BAD_BATCH
        names = [name for part in parts for name in part.names]
        numbers = [number for part in parts for number in part.draw.samples]
        draws = {"seed": self._run.seed, "step": step, "numbers": numbers}
        batches = [_plain(part.content) for part in parts]
        torch.save({"network": turn, "draws": draws, "samples": names, "batches": batches}, path)
        return TrainingError(f"step {step}: {what}; samples {', '.join(names)}; the batch is in {path}")


def _compile_blocks(network: Transformer) -> None:
    """Compile the blocks, each for itself: they are alike, so one compilation serves them all."""
    for layers in network.children():
        if isinstance(layers, nn.ModuleList):
            for block in layers:
                block.compile(dynamic=False)


def _plain(content: Any) -> Any:
    """A batch as mappings, lists, tensors and text, which `torch.load` reads without trusting the file."""
    if isinstance(content, Tensor):
        return content.detach().cpu()
    if is_dataclass(content):
        return {field.name: _plain(getattr(content, field.name)) for field in fields(content)}
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content if isinstance(content, int | float | str | None) else repr(content)
