"""Generated beside true frames: a clip's first chunk is given, the model goes on along the clip's true camera path.

Frames are (t, y, x, 3) uint8 RGB. Two baselines say what the numbers mean: repeating the last given frame (what a
model that knows nothing reaches) and the autoencoder's own reconstruction (what the best one could reach).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minwm.data.clips import Clip
from minwm.data.video import encode_video
from minwm.errors import DataError
from minwm.geometry.camera import relative_viewmats
from minwm.models.autoencoder import PIXELS_PER_LATENT
from minwm.models.conditions import Conditions, first_image
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.worlds import World
from minwm.randomness import generator

HORIZONS = (0.5, 1.0)  # seconds after the last given frame
_LEAST_ERROR = 1 / 12  # the variance of rounding to 8 bits; equal frames would be infinitely good
_GAP = 4  # pixels between pictures, even for the video codec
_STRIP = 8  # pictures in a strip's row


@dataclass(frozen=True, kw_only=True)
class Psnr:
    """Decibels against the true frames, (t,) float64 each, one for every frame after the given ones."""

    generated: NDArray[np.float64]
    repeat_last: NDArray[np.float64]
    autoencoder: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One clip: the given frames, and what followed in truth and in the model."""

    clip: str
    given: NDArray[np.uint8]
    true: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    psnr: Psnr


@torch.inference_mode()
def roll_out(world: World, clip: Clip, *, chunks: int, seed: int, steps: int | None = None) -> NDArray[np.uint8]:
    """The frames of `chunks` chunks that follow the clip's first one, which the model and the decoder are given.

    `steps` as in `StreamingEngine`. The noise depends on the seed, the clip's name, the frame and the step.
    Raises DataError for a clip that is too short, or of another size than the world's.
    """
    model, config = world.backbone.model, world.backbone.config
    chunk = config.history.chunk
    given = _true_latents(world, clip, (1 + chunks) * chunk)[:, :chunk]
    viewmats = torch.from_numpy(relative_viewmats(clip.poses[: (1 + chunks) * chunk]))[None]
    conditions = Conditions(
        cameras=Cameras.track(viewmats, torch.from_numpy(clip.intrinsics)[None]),
        actions=torch.from_numpy(clip.actions[: (1 + chunks) * chunk])[None],
        image=first_image(given[:, 0]),
    )
    prompt = model.prompt(world.backbone.encode([clip.caption]))
    levels = config.sampling_levels(steps or world.card.steps)
    rollout = ChunkRollout(model, config.history, given.shape[2:])
    rollout.commit(given, prompt, conditions.frames(0, chunk))
    stream = [given]
    for _ in range(chunks):
        first = rollout.frames
        here = conditions.frames(first, first + chunk)
        renoise = partial(_noise, (seed, clip.name, first), given)
        latents = rollout.denoise(renoise(-1), prompt, here, levels, renoise)
        rollout.commit(latents, prompt, here)
        stream.append(latents)
    return _decode(world, torch.cat(stream, dim=1))[chunk * FRAMES_PER_LATENT :]


@torch.inference_mode()
def compare(world: World, clip: Clip, *, chunks: int, seed: int, steps: int | None = None) -> Comparison:
    """Roll out a clip and measure it against the true frames. Arguments and errors are `roll_out`'s."""
    generated = roll_out(world, clip, chunks=chunks, seed=seed, steps=steps)
    given = world.backbone.config.history.chunk * FRAMES_PER_LATENT
    frames = clip.video()[: given + len(generated)]
    true = frames[given:]
    decoded = _decode(world, _true_latents(world, clip, len(frames) // FRAMES_PER_LATENT))[given:]
    measured = Psnr(
        generated=psnr(generated, true),
        repeat_last=psnr(frames[given - 1 : given], true),
        autoencoder=psnr(decoded, true),
    )
    return Comparison(clip=clip.name, given=frames[:given], true=true, generated=generated, psnr=measured)


def psnr(frames: NDArray[np.uint8], true: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal to noise (t,) in dB of each frame; at most 58.9, where the error is that of rounding to 8 bits."""
    error = np.square(frames.astype(np.float64) - true).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, _LEAST_ERROR)))


def psnr_table(comparisons: Sequence[Comparison], fps: float) -> dict[str, Any]:
    """Means over the clips: `per_frame` curves by name, and `at` each of HORIZONS that the rollouts reach.

    "At 0.5 s" is the frame shown 0.5 s after the last given one.
    """
    curves = {
        field.name: np.mean([getattr(comparison.psnr, field.name) for comparison in comparisons], axis=0)
        for field in fields(Psnr)
    }
    frames = {seconds: round(seconds * fps) - 1 for seconds in HORIZONS}
    return {
        "per_frame": {name: curve.tolist() for name, curve in curves.items()},
        "at": [
            {"seconds": seconds, **{name: float(curve[frame]) for name, curve in curves.items()}}
            for seconds, frame in frames.items()
            if 0 <= frame < len(curves["generated"])
        ],
    }


def side_by_side(comparison: Comparison, fps: float) -> bytes:
    """An MP4, true on the left and generated on the right; the given frames come first, on both sides."""
    left = np.concatenate([comparison.given, comparison.true])
    right = np.concatenate([comparison.given, comparison.generated])
    gap = np.zeros((*left.shape[:2], _GAP, 3), np.uint8)
    return encode_video(np.concatenate([left, gap, right], axis=2), fps)


def strip(comparison: Comparison) -> bytes:
    """A PNG: the last given frame, then frames at even distances; true above, generated below."""
    chosen = np.linspace(0, len(comparison.true), _STRIP).round().astype(int)
    rows = []
    for frames in (comparison.true, comparison.generated):
        row = np.concatenate([comparison.given[-1:], frames])[chosen]
        bordered = np.pad(row, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(bordered), axis=1))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)[:-_GAP, :-_GAP]).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(comparison: Comparison, folder: Path, fps: float) -> dict[str, str]:
    """Write the clip's video and strip; their names in `folder`."""
    names = {"video": f"{comparison.clip}.mp4", "strip": f"{comparison.clip}.png"}
    (folder / names["video"]).write_bytes(side_by_side(comparison, fps))
    (folder / names["strip"]).write_bytes(strip(comparison))
    return names


def _true_latents(world: World, clip: Clip, frames: int) -> Tensor:
    """The clip's first latents (1, frames, c, y, x), of the world's type."""
    card, channels = world.card, world.backbone.config.architecture.channels
    expected = (channels, card.height // PIXELS_PER_LATENT, card.width // PIXELS_PER_LATENT)
    if clip.latents.shape[1:] != expected:
        raise DataError(f"clip {clip.name}: latents are {clip.latents.shape[1:]}, {card.name} expects {expected}")
    if len(clip.latents) < frames:
        raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, the rollout needs {frames}")
    dtype = next(world.backbone.model.parameters()).dtype
    return torch.from_numpy(clip.latents[:frames])[None].to(dtype)


def _noise(key: tuple[int | str, ...], like: Tensor, step: int) -> Tensor:
    """Standard normal, of the shape and type of `like`, for after the step; step −1 is what the chunk starts from."""
    return torch.randn(like.shape, generator=generator(*key, step)).to(like.dtype)


def _decode(world: World, latents: Tensor) -> NDArray[np.uint8]:
    """Latents (1, f, c, y, x), one stream from its start, as frames (4·f, y, x, 3)."""
    frames, _ = world.autoencoder.decode(latents)
    return (frames[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
