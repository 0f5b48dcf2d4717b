"""How long until the first frame is shown, and how many a second after that, for each way of sampling.

From a start picture and a prompt to RGB frames in memory, one session, warm. The ways take turns in every round, so
that a machine that slows down slows all of them; figures are medians over the rounds. A bidirectional model shows
nothing before its whole clip is finished; one that streams shows its first chunk, and is timed for the rest with a full
window.
Speed does not depend on what the weights are, only on how many there are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS, schedule
from minwm.errors import ConfigError
from minwm.evaluation.rollouts import Sampling, decode, few_steps, many_steps
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions, first_image
from minwm.models.context import Full
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.worlds import World
from minwm.randomness import generator


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """rounds: in which every way is timed once. bidirectional_frames: latent frames of the clip it makes at a time."""

    rounds: int = 3
    bidirectional_steps: int = 50
    bidirectional_frames: int = 16
    teacher_steps: int = 48
    student_steps: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        if min(self.rounds, self.bidirectional_steps, self.teacher_steps, *self.student_steps) < 1:
            raise ConfigError(f"speed: {self}: expected rounds and steps of at least 1")


def measure_speed(
    world: World,
    config: SpeedConfig,
    *,
    base: Backbone | None = None,
    teacher: Backbone | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Time every way; `base` and `teacher` are the world's own backbone unless given.

    The result's `ways` have name, steps, first_frame_seconds and frames_per_second; `bidirectional_over_ours` is the
    ratio of the bidirectional model's first frame to the student's in the world's own number of steps.
    """
    own = world.card.steps
    offered = [steps for steps in dict.fromkeys((own, *config.student_steps)) if steps in world.backbone.config.levels]
    long = teacher or world.backbone
    ways: dict[str, tuple[int, _Way]] = {
        "bidirectional": (config.bidirectional_steps, _Bidirectional(world, base or world.backbone, config)),
        "teacher": (config.teacher_steps, _Streaming(world, long, many_steps(long.config, config.teacher_steps))),
        **{f"student_{n}": (n, _Streaming(world, world.backbone, few_steps(world, n))) for n in offered},
    }
    for _, way in ways.values():
        way.run(way.levels[:1])
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for done in range(1, config.rounds + 1):
        for name, (_, way) in ways.items():
            taken[name].append(way.run(way.levels))
        if progress is not None:
            progress(done)
    medians = {name: [median(values) for values in zip(*pairs, strict=True)] for name, pairs in taken.items()}
    rows = [
        {"name": name, "steps": steps, "first_frame_seconds": medians[name][0], "frames_per_second": medians[name][1]}
        for name, (steps, _) in ways.items()
    ]
    return {
        "rounds": config.rounds,
        "size": [world.card.height, world.card.width],
        "bidirectional_frames": config.bidirectional_frames * FRAMES_PER_LATENT,
        "ways": rows,
        "bidirectional_over_ours": medians["bidirectional"][0] / medians[f"student_{own}"][0],
    }


class _Way(Protocol):
    """One way to sample a world that stands still, from a grey picture."""

    levels: Sequence[float]

    def run(self, levels: Sequence[float]) -> tuple[float, float]:
        """Seconds to the first frame, and frames per second after it, at these noise levels."""


class _Streaming:
    """Chunk by chunk from a cache."""

    def __init__(self, world: World, backbone: Backbone, sampling: Sampling) -> None:
        self._world, self._backbone, self._ode = world, backbone, sampling.ode
        self.levels: Sequence[float] = sampling.levels

    @torch.inference_mode()
    def run(self, levels: Sequence[float]) -> tuple[float, float]:
        model, history = self._backbone.model, self._backbone.config.history
        chunk, full = history.chunk, -(-history.window // history.chunk)  # chunks that fill the window
        started = _now()
        start, conditions = _still(self._world, self._backbone, (full + 2) * chunk)
        prompt = model.prompt(self._backbone.encode([""]))
        rollout = ChunkRollout(model, history, start.shape[2:])
        rollout.commit(start, prompt, conditions.frames(0, chunk))
        _, state = self._world.autoencoder.decode(start)

        def next_chunk() -> Tensor:
            here = conditions.frames(rollout.frames, rollout.frames + chunk)
            if self._ode:
                return rollout.denoise_ode(_noise(start), prompt, here, levels)
            return rollout.denoise(_noise(start), prompt, here, levels, lambda step: _noise(start))

        latents = next_chunk()
        frames, state = decode(self._world, latents, state)
        first = _now() - started
        for _ in range(full):
            rollout.commit(latents, prompt, conditions.frames(rollout.frames, rollout.frames + chunk))
        started = _now()
        latents = next_chunk()
        frames, state = decode(self._world, latents, state)
        rollout.commit(latents, prompt, conditions.frames(rollout.frames, rollout.frames + chunk))
        return first, len(frames) / (_now() - started)


class _Bidirectional:
    """A whole clip at once, its first chunk given."""

    def __init__(self, world: World, backbone: Backbone, config: SpeedConfig) -> None:
        self._world, self._backbone = world, backbone
        self._frames = max(config.bidirectional_frames, 2 * backbone.config.history.chunk)
        self.levels: Sequence[float] = schedule(config.bidirectional_steps, backbone.config.shift)

    @torch.inference_mode()
    def run(self, levels: Sequence[float]) -> tuple[float, float]:
        model, chunk, frames = self._backbone.model, self._backbone.config.history.chunk, self._frames
        started = _now()
        start, conditions = _still(self._world, self._backbone, frames)
        prompt = model.prompt(self._backbone.encode([""]), bidirectional=True)

        def predict(x: Tensor, level: float) -> Tensor:
            sigma = torch.full((1, frames), level, device=x.device)
            sigma[:, :chunk] = 0.0
            clip = torch.cat([start, x[:, chunk:]], dim=1)
            return model(clip, sigma * TIMESTEPS, prompt, Full(frames), conditions)  # type: ignore[no-any-return]

        noise = _noise(start[:, :1].expand(-1, frames, -1, -1, -1))
        made = samplers.euler(predict, noise, levels)[:, chunk:]
        _, state = self._world.autoencoder.decode(start)
        shown, state = decode(self._world, made[:, :chunk], state)
        first = _now() - started
        rest, _ = decode(self._world, made[:, chunk:], state)
        return first, (len(shown) + len(rest)) / (_now() - started)


def _still(world: World, backbone: Backbone, frames: int) -> tuple[Tensor, Conditions]:
    """Latents of a grey picture, for one chunk, and what steers `frames` latent frames that stand still."""
    card, parameter = world.card, next(backbone.model.parameters())
    shape = (1, backbone.config.history.chunk * FRAMES_PER_LATENT, 3, card.height, card.width)
    start, _ = world.autoencoder.encode(torch.full(shape, 0.5, dtype=parameter.dtype, device=parameter.device))
    conditions = Conditions(
        cameras=Cameras.track(torch.eye(4).expand(1, frames, 4, 4), torch.tensor([card.intrinsics])),
        actions=torch.zeros(1, frames, dtype=torch.int64),
        image=first_image(start[:, 0]),
    )
    return start, conditions.to(start.device)


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator("speed")).to(like)


def _now() -> float:
    """Seconds, once everything asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
