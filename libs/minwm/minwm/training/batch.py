"""Clips to batches, and batches to windows of them: what the backbone stages have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.data.clips import Clip
from minwm.errors import ConfigError, DataError
from minwm.geometry.camera import crop_intrinsics, invert, relative_viewmats, se3_exp
from minwm.models import prope
from minwm.models.backbones import Encode
from minwm.models.conditions import Conditions, first_image
from minwm.models.prope import Cameras
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class PoseNoise:
    """Standard deviations of a wrong annotation: world units along, and degrees about, each of the camera's axes."""

    translation: float = 0.0
    rotation_degrees: float = 0.0

    def __post_init__(self) -> None:
        if min(self.translation, self.rotation_degrees) < 0:
            raise ConfigError(f"pose_noise: {self.translation}, {self.rotation_degrees}: expected at least 0 each")

    def applied(self, clip: Clip, draw: Draw) -> NDArray[np.float64]:
        """The clip's poses (f, 4, 4), each moved by an error of its own, the same in every step as a dataset's is."""
        if self == PoseNoise():
            return clip.poses
        scale = np.repeat([self.translation, np.radians(self.rotation_degrees)], 3)
        twists = scale * draw.lasting_normal("pose noise", clip.name, (len(clip.poses), 6)).double().numpy()
        return clip.poses @ np.stack([se3_exp(twist) for twist in twists])


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut from clips.

    crop: sides (y, x) in latents of the random piece of the picture that a sample is, seen through that piece's
        own intrinsics; None: the whole
    prompt_dropout, image_dropout: shares of samples trained without their caption, or first image
    pose_noise: makes the cameras (not the actions) wrong, to see what good annotations are worth
    """

    frames: int = 8
    crop: tuple[int, int] | None = None
    prompt_dropout: float = 0.1
    image_dropout: float = 0.0
    pose_noise: PoseNoise = PoseNoise()

    def __post_init__(self) -> None:
        if self.crop is not None and min(self.crop) < 1:
            raise ConfigError(f"window.crop={self.crop}: expected positive sides")
        if self.frames < 1 or not (0 <= self.prompt_dropout <= 1 and 0 <= self.image_dropout <= 1):
            raise ConfigError(
                f"window: frames={self.frames}, prompt_dropout={self.prompt_dropout}, "
                f"image_dropout={self.image_dropout}: expected at least one frame, and shares of 0 to 1"
            )


@dataclass(frozen=True)
class Batch:
    """latents (b, f, c, y, x) float32, what steers the same frames, text as the backbone's `prompt` takes it."""

    latents: Tensor
    conditions: Conditions
    text: Any
    captions: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        return replace(
            self,
            latents=self.latents.to(device),
            conditions=self.conditions.to(device),
            text=_moved(self.text, device),
        )


def encoded(captions: Sequence[str], encode: Encode, device: torch.device | str) -> Any:
    """`Batch.text` of captions, on a device."""
    return _moved(encode(captions), device)


def unprompted(batch: Batch, encode: Encode) -> Any:
    """What `text` is without a prompt: the empty one, which prompt dropout trains."""
    return encoded([""] * len(batch.captions), encode, batch.latents.device)


def cut_windows(clips: Sequence[Clip], draw: Draw, config: WindowConfig, encode: Encode) -> Batch:
    """A random window of `config.frames` latent frames from each clip; cameras relative to its first frame.

    The first frame's motion and action are those from the frame before the window.
    """
    latents, cameras, lenses, actions, captions = [], [], [], [], []
    drawn = (draw.uniform("window"), draw.uniform("crop", (2,)), draw.uniform("prompt"))
    for clip, place, corner, dropped in zip(clips, *(numbers.cpu() for numbers in drawn), strict=True):
        room = len(clip.latents) - config.frames
        if room < 0:
            raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, windows need {config.frames}")
        start = int(place * (room + 1))
        window = slice(start, start + config.frames)
        piece, intrinsics = _crop(clip, window, config.crop, corner)
        poses = config.pose_noise.applied(clip, draw)
        latents.append(torch.from_numpy(piece).float())
        lenses.append(torch.from_numpy(intrinsics))
        cameras.append((relative_viewmats(poses[window]), _viewmat_before(poses, start)))
        actions.append(torch.from_numpy(clip.actions[window]))
        captions.append("" if dropped < config.prompt_dropout else clip.caption)
    viewmats, before = (torch.from_numpy(np.stack(part)) for part in zip(*cameras, strict=True))
    stacked = torch.stack(latents)
    shown = (draw.uniform("image").cpu() >= config.image_dropout)[:, None, None, None]
    conditions = Conditions(
        cameras=Cameras.track(viewmats, torch.stack(lenses), before),
        actions=torch.stack(actions),
        image=first_image(stacked[:, 0]) * shown,
    )
    return Batch(stacked, conditions, encode(captions), tuple(captions)).to(draw.device)


def window_conditions(conditions: Conditions, latents: Tensor, start: int, end: int) -> Conditions:
    """Conditions of frames [start, end) as a clip of their own, whose latents these are.

    Cameras are relative to the window's first frame, as `cut_windows` makes them, and the first image is
    that frame's, for the streams that have one.
    """
    if start == 0:
        return conditions.frames(0, end)
    cut = conditions.frames(start, end)
    cameras = cut.cameras
    if cameras is not None:
        viewmats = cameras.viewmats.double()
        anchored = viewmats @ prope.invert(viewmats[:, :1])
        cameras = Cameras(anchored.to(cameras.viewmats.dtype), cameras.intrinsics, cameras.motions)
    image = cut.image
    if image is not None:
        image = first_image(latents[:, 0].detach()) * image[:, -1:]
    return Conditions(cameras, cut.actions, image)


def _moved(text: Any, device: torch.device | str) -> Any:
    """A backbone's text, a tensor or a dataclass of them, on a device."""
    if is_dataclass(text) and not isinstance(text, type):
        return replace(text, **{field.name: _moved(getattr(text, field.name), device) for field in fields(text)})
    return text.to(device)


def _crop(
    clip: Clip, window: slice, crop: tuple[int, int] | None, corner: Tensor
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """The window's latents (f, c, y, x) and intrinsics (4,), of the piece whose place is `corner` (2,) in [0, 1)."""
    latents = clip.latents[window]
    if crop is None:
        return latents, clip.intrinsics
    rows, columns = latents.shape[-2:]
    if crop[0] > rows or crop[1] > columns:
        raise DataError(f"clip {clip.name}: latents are {rows}x{columns}, too small for window.crop={crop}")
    top, left = (
        int(place * (space + 1)) for place, space in zip(corner, (rows - crop[0], columns - crop[1]), strict=True)
    )
    piece = latents[..., top : top + crop[0], left : left + crop[1]]
    return piece, crop_intrinsics(clip.intrinsics, (rows, columns), (top, left), crop)


def _viewmat_before(poses: NDArray[np.float64], start: int) -> NDArray[np.float32]:
    """The viewmat (4, 4), in the world of frame `start`, of the frame before it; a clip's first frame is at rest."""
    return np.asarray(invert(poses[max(start - 1, 0)]) @ poses[start], np.float32)
