"""What a recipe would take, worked out from sizes alone: shapes, parameters, memory, FLOPs of a step.

Needs no weights and no dataset: shapes are the dataset's where it is there, else those that the backbone is usually
run at. FLOPs are means over what a step draws (turns, numbers of sampling steps, exit steps, windows).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.filesize import decimal
from rich.table import Table

from minwm.config import build
from minwm.data.clips import KIND as CLIPS
from minwm.data.shards import MANIFEST, read_manifest
from minwm.errors import ConfigError
from minwm.models.backbones import load_config
from minwm.models.context import History
from minwm.models.costs import (
    Pass,
    Sizes,
    activation_bytes,
    forward_flops,
    latent_size,
    parameters,
    picture_size,
    prompt_flops,
)
from minwm.models.presets import WorldConfig, preset
from minwm.models.wan import WanConfig
from minwm.training.autoregressive import AutoregressiveConfig
from minwm.training.batch import WindowConfig
from minwm.training.bidirectional import BidirectionalConfig
from minwm.training.consistency import ConsistencyConfig
from minwm.training.dmd import DMDConfig
from minwm.training.recipe import PRESET, Recipe
from minwm.training.trajectories import KIND as TRAJECTORIES

PROCESSES = (1, 2, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a run. averaged: a slow copy that is spread over the processes and never run."""

    name: str
    parameters: int
    trained: bool = False
    averaged: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of a kind of pass: of one sample, in the mean step."""

    name: str
    forward: float
    gradient: bool = False

    @property
    def backward(self) -> float:
        """Twice the forward, where there is one."""
        return 2 * self.forward * self.gradient


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe comes to. frames: of the longest pass with gradient; activations are that pass's."""

    recipe: Recipe
    world: WorldConfig
    size: tuple[int, int]
    size_from: str
    window: int
    tokens: int
    frames: int
    networks: Sequence[Network]
    work: Sequence[Work]

    @property
    def flops(self) -> float:
        """Of a step, forward and backward, nothing computed twice."""
        return self.recipe.run.batch_size * sum(work.forward + work.backward for work in self.work)

    @property
    def recomputed(self) -> float:
        """FLOPs of a step that activation checkpointing adds."""
        return self.recipe.run.batch_size * sum(work.forward for work in self.work if work.gradient)

    def activations(self, *, checkpointed: bool) -> int:
        """Bytes of one sample."""
        return activation_bytes(
            self.world.architecture, self.frames * self.tokens, bf16=self.recipe.run.bf16, checkpointed=checkpointed
        )

    def states(self, zero: int, processes: int) -> float:
        """Bytes of weights, gradients, AdamW's moments and averages that one process holds, all float32.

        From ZeRO-1 on DeepSpeed keeps a second copy of the weights, which it updates, in parts. With bf16, autocast's
        copies of what is trained are counted.
        """
        trained = sum(network.parameters for network in self.networks if network.trained)
        averaged = sum(network.parameters for network in self.networks if network.averaged)
        frozen = sum(network.parameters for network in self.networks) - trained - averaged
        moments = trained * (8 if zero == 0 else 12 / processes)
        gradients = 4 * trained / (processes if zero >= 2 else 1)
        weights = 4 * trained / (processes if zero == 3 else 1) + 2 * trained * self.recipe.run.bf16
        return weights + gradients + moments + 4 * frozen + 4 * averaged / processes


def plan(recipe: Recipe, latents: tuple[int, int] | None = None) -> Plan:
    """Work out a recipe; `latents`: rows and columns of a sample, where they are known.

    Raises ConfigError for stages that train no transformer, and for whatever does not fit.
    """
    if recipe.stage not in _WORK:
        raise ConfigError(f"stage: {recipe.stage!r} trains no transformer, a dry run is for {', '.join(_WORK)}")
    world = _world(recipe)
    window = _window(recipe, world.history)
    size, size_from = (latents, "given") if latents else _latent_size(recipe, window, world.architecture)
    patch = world.architecture.patch
    tokens = (size[0] // patch[0]) * (size[1] // patch[1])
    scope = _Scope(recipe, world, window.frames, tokens)
    networks, frames, work = _WORK[recipe.stage](scope)
    return Plan(
        recipe=recipe,
        world=world,
        size=size,
        size_from=size_from,
        window=window.frames,
        tokens=tokens,
        frames=frames,
        networks=networks,
        work=work,
    )


def _world(recipe: Recipe) -> WorldConfig:
    """The backbone's configuration, as the recipe changes it."""
    name = recipe.backbone.removeprefix(PRESET)
    world = preset(name) if recipe.backbone.startswith(PRESET) else load_config(Path(name))
    if recipe.conditions is not None:
        world = replace(world, architecture=replace(world.architecture, conditions=recipe.conditions))
    return world if recipe.history is None else replace(world, history=recipe.history)


def _window(recipe: Recipe, history: History) -> WindowConfig:
    """What samples are: the method's window, or the one that trajectories were sampled on."""
    if recipe.stage != "ode":
        return build(WindowConfig, recipe.method.get("window", {}), "method.window")
    if (recipe.data / MANIFEST).is_file():
        sampling = read_manifest(recipe.data, TRAJECTORIES).about["sampling"]
        return build(WindowConfig, sampling["window"], f"{recipe.data}: sampling.window")
    return WindowConfig(frames=history.window)


def _latent_size(recipe: Recipe, window: WindowConfig, architecture: Sizes) -> tuple[tuple[int, int], str]:
    """Rows and columns of the latents that a sample has, and where that comes from."""
    if window.crop is not None:
        return window.crop, "the window's crop"
    if (recipe.data / MANIFEST).is_file() and recipe.stage != "ode":
        height, width = read_manifest(recipe.data, CLIPS).about["size"]
        return latent_size(architecture, height, width), f"{recipe.data}, {height}×{width} pixels"
    small = isinstance(architecture, WanConfig) and architecture.byte_text
    height, width = picture_size("wan-doom" if small else "")
    return latent_size(architecture, height, width), f"assumed, {height}×{width} pixels"


_Worked = tuple[list[Network], int, list[Work]]


@dataclass(frozen=True)
class _Scope:
    """What the stages' figures are made of."""

    recipe: Recipe
    world: WorldConfig
    window: int
    tokens: int

    def network(self, name: str, *, trained: bool = False, averaged: bool = False) -> Network:
        """One of the backbone's size."""
        count = parameters(self.world.architecture)
        return Network(name=name, parameters=count, trained=trained, averaged=averaged)

    def full(self, times: float = 1) -> float:
        """Bidirectional passes over the window, each with a prompt."""
        architecture = self.world.architecture
        made = prompt_flops(architecture) if isinstance(architecture, WanConfig) else 0
        return times * (forward_flops(architecture, Pass.full(self.window, self.tokens)).total + made)

    def teacher_forced(self, times: float = 1) -> float:
        """Teacher-forced passes over the window, each with a prompt."""
        shape = Pass.teacher_forced(self.window, self.tokens, self.world.history)
        return times * (forward_flops(self.world.architecture, shape).total + prompt_flops(self.world.architecture))

    def cached(self, start: int) -> int:
        """A chunk that sees `start` frames before it, or as many as the window holds."""
        shape = Pass.cached(self.world.history, self.tokens, start)
        return forward_flops(self.world.architecture, shape).total


def _bidirectional(scope: _Scope) -> _Worked:
    build(BidirectionalConfig, scope.recipe.method, "method")
    work = Work(name="bidirectional", forward=scope.full(), gradient=True)
    return [scope.network("generator", trained=True)], scope.window, [work]


def _teacher_forced(scope: _Scope) -> _Worked:
    if scope.recipe.stage == "autoregressive":
        build(AutoregressiveConfig, scope.recipe.method, "method")
    scope.world.history.require_chunks(scope.window)
    work = Work(name="teacher-forced", forward=scope.teacher_forced(), gradient=True)
    return [scope.network("generator", trained=True)], 2 * scope.window, [work]


def _consistency(scope: _Scope) -> _Worked:
    config = build(ConsistencyConfig, scope.recipe.method, "method")
    scope.world.history.require_chunks(scope.window)
    networks = [scope.network("generator", trained=True), scope.network("teacher"), scope.network("target")]
    guided = config.guidance != 1
    work = [
        Work(name="student", forward=scope.teacher_forced(), gradient=True),
        Work(name="teacher, with guidance" if guided else "teacher", forward=scope.teacher_forced(1 + guided)),
        Work(name="target", forward=scope.teacher_forced()),
    ]
    return networks, 2 * scope.window, work


def _dmd(scope: _Scope) -> _Worked:
    config = build(DMDConfig, scope.recipe.method, "method")
    scope.world.history.require_chunks(scope.window)
    generator = 1 / config.critic_ratio  # turns a step; the critic has one in every step
    plain, graded = _rollout(config, scope.world.history, scope)
    prompt = prompt_flops(scope.world.architecture)
    networks = [
        scope.network("generator", trained=True),
        scope.network("critic", trained=True),
        scope.network("real score"),
        scope.network("average", averaged=True),
    ]
    work = [
        Work(name="generator: exit steps", forward=generator * (graded + prompt), gradient=True),
        Work(name="generator: steps before them, commits", forward=generator * plain),
        Work(name="generator: real and fake score", forward=scope.full(generator * (2 + (config.guidance != 1)))),
        Work(name="critic: rollout", forward=plain + graded + prompt),
        Work(name="critic: its own pass", forward=scope.full(), gradient=True),
    ]
    return networks, scope.window, work


def _rollout(config: DMDConfig, history: History, scope: _Scope) -> tuple[float, float]:
    """FLOPs of a mean rollout's passes without, and with gradient where the generator has its turn."""
    length, chunk = config.rollout_frames or config.window.frames, history.chunk
    plain, graded = [], []
    for start in range(0, length - config.window.frames + 1, chunk):
        end, without, within = start + config.window.frames, 0.0, 0.0
        for first in range(0, end, chunk):
            cost = scope.cached(first)
            if first >= config.context_chunks * chunk:
                steps = fmean(config.steps)
                within += cost * (first >= start)
                without += cost * ((steps - 1) / 2 if first >= start else steps)
            without += cost * (first + chunk < end)
        plain.append(without)
        graded.append(within)
    return fmean(plain), fmean(graded)


_WORK = {
    "bidirectional": _bidirectional,
    "autoregressive": _teacher_forced,
    "ode": _teacher_forced,
    "consistency": _consistency,
    "dmd": _dmd,
}


def tables(plan: Plan) -> Iterator[Table]:
    """The figures, for a terminal."""
    yield _shapes(plan)
    yield _networks(plan)
    yield _memory(plan)
    yield _flops(plan)


def _shapes(plan: Plan) -> Table:
    run, history, (rows, columns) = plan.recipe.run, plan.world.history, plan.size
    table = Table("shapes", "", title=f"{plan.recipe.stage}, {plan.world.preset}", title_justify="left", min_width=72)
    table.add_row(
        "samples", f"{run.batch_size} a step, in {run.accumulation} parts of {run.batch_size // run.accumulation}"
    )
    table.add_row("latents", f"{plan.world.architecture.channels} × {rows} × {columns} ({plan.size_from})")
    table.add_row("window", f"{plan.window} latent frames of {plan.tokens:,} tokens")
    table.add_row("longest pass with gradient", f"{plan.frames * plan.tokens:,} tokens a sample")
    table.add_row("history", f"chunks of {history.chunk}, window {history.window}, sink {history.sink}")
    table.add_row("conditions", ", ".join(plan.world.architecture.conditions) or "none")
    return table


def _networks(plan: Plan) -> Table:
    table = Table("network", "parameters", "", min_width=72)
    table.columns[1].justify = "right"
    for network in plan.networks:
        kind = "trained" if network.trained else "average" if network.averaged else "frozen"
        table.add_row(network.name, f"{network.parameters / 1e6:,.1f} M", kind)
    return table


def _memory(plan: Plan) -> Table:
    run = plan.recipe.run
    table = Table("memory of a process", *(f"{n} processes" if n > 1 else "1 process" for n in PROCESSES), min_width=72)
    for column in table.columns[1:]:
        column.justify = "right"
    for zero in range(4):
        table.add_row(f"weights etc., ZeRO-{zero}", *(decimal(int(plan.states(zero, n))) for n in PROCESSES))
    table.add_section()
    for name, checkpointed in (("activations, roughly", False), ("  checkpointed", True)):
        sample = plan.activations(checkpointed=checkpointed)
        parts = (-(-run.batch_size // (run.accumulation * n)) for n in PROCESSES)
        table.add_row(name, *(decimal(sample * samples) for samples in parts))
    return table


def _flops(plan: Plan) -> Table:
    table = Table("FLOPs of a step", "forward", "backward", min_width=72)
    for column in table.columns[1:]:
        column.justify = "right"
    for work in plan.work:
        forward, backward = (plan.recipe.run.batch_size * flops for flops in (work.forward, work.backward))
        table.add_row(work.name, _flop(forward), _flop(backward) if work.gradient else "")
    table.add_section()
    table.add_row("together", _flop(plan.flops), "")
    table.add_row("with activations checkpointed", _flop(plan.flops + plan.recomputed), "")
    return table


def _flop(flops: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:,.2f} {unit}"
    return f"{flops / 1e9:,.2f} GFLOP"
