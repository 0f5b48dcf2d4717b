"""Frames that a world generates along a walk, and the two things they are compared with that need no model.

Frames are (t, y, x, 3) uint8 RGB. The first chunk is given to the model and the decoder; what is generated follows it.
Repeating the last given frame is what a model that knows nothing reaches; the autoencoder's own reconstruction is
what the best one could reach.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.data.clips import Clip
from minwm.diffusion.flow import schedule
from minwm.errors import ConfigError
from minwm.evaluation.walks import Walk, along_clip, require_fit
from minwm.geometry.camera import relative_viewmats
from minwm.models.autoencoder import State
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions, first_image
from minwm.models.layers import dtype_of
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.presets import WorldConfig
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.sampling import Guidance, TeacherRollout
from minwm.models.worlds import World
from minwm.randomness import generator


@dataclass(frozen=True)
class Sampling:
    """How a chunk is made: at which noise levels, and whether they follow the ODE, as in a many-step teacher.

    guidance: by the prompt, of what follows the ODE; 1 is none
    """

    levels: tuple[float, ...]
    ode: bool = False
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance != 1 and not self.ode:
            raise ConfigError(f"guidance={self.guidance}: expected 1 where few steps do not follow the ODE")


def few_steps(world: World, steps: int | None = None) -> Sampling:
    """As the world samples in a session. Raises ConfigError for a number of steps it does not offer."""
    return Sampling(world.backbone.config.sampling_levels(steps or world.card.steps))


def many_steps(config: WorldConfig, steps: int, guidance: float = 1.0) -> Sampling:
    """As a model that is not distilled samples: Euler steps down the schedule it was trained with."""
    return Sampling(tuple(schedule(steps, config.shift)), ode=True, guidance=guidance)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One clip: its given frames, the true ones that follow, and what others put in their place, by name."""

    clip: str
    given: NDArray[np.uint8]
    true: NDArray[np.uint8]
    others: dict[str, NDArray[np.uint8]]


def compare(world: World, clip: Clip, *, chunks: int, seed: int, sampling: Sampling | None = None) -> Comparison:
    """Roll out a clip: `generated`, beside the baselines `repeat_last` and `autoencoder`. Raises as `roll_out` does."""
    generated = roll_out(world, along_clip(world, clip, chunks), seed=seed, sampling=sampling)
    given = world.backbone.config.history.chunk * FRAMES_PER_LATENT
    frames = clip.video()[: given + len(generated)]
    others = {
        "generated": generated,
        "repeat_last": np.repeat(frames[given - 1 : given], len(generated), axis=0),
        "autoencoder": reconstruct(world, clip, len(frames) // FRAMES_PER_LATENT)[given:],
    }
    return Comparison(clip=clip.name, given=frames[:given], true=frames[given:], others=others)


def roll_out(world: World, walk: Walk, *, seed: int, sampling: Sampling | None = None) -> NDArray[np.uint8]:
    """All frames of `stream` in one piece."""
    return np.concatenate(list(stream(world, walk, seed=seed, sampling=sampling)))


@torch.inference_mode()
def stream(world: World, walk: Walk, *, seed: int, sampling: Sampling | None = None) -> Iterator[NDArray[np.uint8]]:
    """The frames of each chunk after the given one, as soon as they are made.

    The noise depends on the seed, the walk's name, the frame and the step. `sampling` is the world's own unless given.
    """
    sampling = sampling or few_steps(world)
    given = _latents(world, walk.given)
    chunk, frames = given.shape[1], len(walk.poses)
    conditions = Conditions(
        cameras=Cameras.track(
            torch.from_numpy(relative_viewmats(walk.poses))[None], torch.from_numpy(walk.intrinsics)[None]
        ),
        actions=torch.from_numpy(walk.actions)[None],
        image=first_image(given[:, 0]),
    ).to(given.device)
    rollout = (_Teacher if sampling.ode else _Student)(world.backbone, walk.caption, given.shape[2:], sampling)
    rollout.commit(given, conditions.frames(0, chunk))
    _, state = world.autoencoder.decode(given)
    while (first := rollout.frames) < frames:
        here = conditions.frames(first, first + chunk)
        renoise = partial(_noise, (seed, walk.name, first), given)
        latents = rollout.denoise(here, renoise)
        decoded, state = decode(world, latents, state)
        yield decoded
        rollout.commit(latents, here)


class _Student:
    """One world that a few-step model makes chunk by chunk under a prompt."""

    def __init__(self, backbone: Backbone, caption: str, shape: Sequence[int], sampling: Sampling) -> None:
        self._prompt = backbone.model.prompt(backbone.encode([caption]))
        self._rollout = ChunkRollout(backbone.model, backbone.config.history, shape)
        self._levels = sampling.levels

    @property
    def frames(self) -> int:
        return self._rollout.frames

    def denoise(self, conditions: Conditions, noise: Callable[[int], Tensor]) -> Tensor:
        """The next chunk; noise: of the chunk after a step, −1 at the start."""
        return self._rollout.denoise(noise(-1), self._prompt, conditions, self._levels, noise)

    def commit(self, latents: Tensor, conditions: Conditions) -> None:
        self._rollout.commit(latents, self._prompt, conditions)


class _Teacher:
    """One that a many-step model makes, with guidance if asked."""

    def __init__(self, backbone: Backbone, caption: str, shape: Sequence[int], sampling: Sampling) -> None:
        texts = [caption] if sampling.guidance == 1 else [caption, ""]
        prompts = [backbone.model.prompt(backbone.encode([text])) for text in texts]
        guidance = Guidance(prompts[0], prompts[1] if len(prompts) > 1 else None, sampling.guidance)
        self._rollout = TeacherRollout(backbone.model, backbone.config.history, shape, guidance)
        self._levels = sampling.levels

    @property
    def frames(self) -> int:
        return self._rollout.frames

    def denoise(self, conditions: Conditions, noise: Callable[[int], Tensor]) -> Tensor:
        """The next chunk, of the noise at the start alone."""
        start = noise(-1)
        return self._rollout.denoise(start, conditions, self._levels).to(start.dtype)

    def commit(self, latents: Tensor, conditions: Conditions) -> None:
        self._rollout.commit(latents, conditions)


@torch.inference_mode()
def reconstruct(world: World, clip: Clip, frames: int) -> NDArray[np.uint8]:
    """The clip's first `frames` latent frames through the decoder. Raises DataError for a clip that does not fit."""
    require_fit(world, clip, frames)
    return decode(world, _latents(world, clip.latents[:frames]))[0]


def decode(world: World, latents: Tensor, state: State | None = None) -> tuple[NDArray[np.uint8], State]:
    """Latents (1, f, c, y, x) as frames (4·f, y, x, 3), and the decoder's state to go on from."""
    frames, state = world.autoencoder.decode(latents, state)
    pixels = (frames[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), state


def _latents(world: World, latents: NDArray[np.float16]) -> Tensor:
    """(f, c, y, x) as (1, f, c, y, x), of the model's type and where it is."""
    model = world.backbone.model
    return torch.from_numpy(latents)[None].to(next(model.parameters()).device, dtype_of(model))


def _noise(key: tuple[int | str, ...], like: Tensor, step: int) -> Tensor:
    """Standard normal, of the shape and type of `like`, for after the step; step −1 is what the chunk starts from."""
    return torch.randn(like.shape, generator=generator(*key, step)).to(like)
