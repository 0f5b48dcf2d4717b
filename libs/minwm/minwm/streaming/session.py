"""One running world: what a session is made of between two chunks.

Poses are (4, 4) float64, camera to world, in the session's own world. Its origin follows the camera
(`move_origin_here`): translations stay small however far one walks, and with them the errors of what is kept by camera.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minwm.errors import SessionError
from minwm.geometry.actions import from_poses
from minwm.geometry.camera import invert
from minwm.geometry.live import CameraVelocity
from minwm.models.autoencoder import State
from minwm.models.conditions import Conditions
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Prompt
from minwm.models.worlds import World
from minwm.streaming.stream import Fidelity

ANCHOR_REACH = 8.0
"""World units from its origin beyond which a session moves its origin to the camera, once in a window at most."""


@dataclass(frozen=True)
class Clean:
    """A chunk's latents (1, f, c, y, x), its first frame's index, and poses (1 + f, 4, 4) from the frame before it on.

    image: `Conditions.image`, of a world that began with a picture
    window: latent frames that it attended to, if not all
    """

    latents: Tensor
    start: int
    poses: NDArray[np.float64]
    image: Tensor | None = None
    window: int | None = None

    def seen_from(self, motion: NDArray[np.float64]) -> "Clean":
        """The same in a world whose origin is at `motion` in the old one."""
        return replace(self, poses=invert(motion[None]) @ self.poses)


class Session:
    """Made by `StreamingEngine`; opaque to everybody else."""

    def __init__(self, rollout: ChunkRollout, caption: str, prompt: Prompt, seed: int, frames_kept: int) -> None:
        """frames_kept: latent frames whose latents are kept, for the context to be made again from."""
        self.rollout, self.seed = rollout, seed
        self.caption, self.prompt = caption, prompt
        self.local = np.eye(4)
        """The camera's pose in the session's own world."""
        self.origin = np.eye(4)
        """The pose of that world's origin in the world as it began."""
        self.anchored = 0
        """Latent frame at which the origin moved last."""
        self.chunks = 0
        self.decoder_state: State | None = None
        self.pending: Clean | None = None
        """A chunk that was shown but not yet written to the cache."""
        self.begun: list[Clean] = []
        """The chunks of the sink."""
        self.kept: deque[Clean] = deque()
        """The chunks of the window."""
        self.closed = False
        self._frames_kept = frames_kept

    @property
    def pose(self) -> NDArray[np.float64]:
        """The camera's pose (4, 4) in the world as it began."""
        return self.origin @ self.local

    @property
    def frames(self) -> int:
        """Latent frames made so far."""
        return self.rollout.frames + (0 if self.pending is None else self.pending.latents.shape[1])

    def remember(self, chunk: Clean, sink: int) -> None:
        """Keep a chunk that was committed for as long as the cache does."""
        if chunk.start < sink:
            self.begun.append(chunk)
        self.kept.append(chunk)
        while sum(one.latents.shape[1] for one in self.kept) > self._frames_kept:
            self.kept.popleft()

    @property
    def strayed(self) -> bool:
        """Whether the camera is far from the origin."""
        return float(np.linalg.norm(self.local[:3, 3])) > ANCHOR_REACH

    def move_origin_here(self) -> None:
        """Express everything in a world whose origin is where the camera is, its axes as they were.

        Nothing may be pending.
        """
        motion = np.eye(4)
        motion[:3, 3] = self.local[:3, 3]
        self.rollout.move_world(torch.from_numpy(motion)[None])
        self.origin = self.origin @ motion
        self.local = invert(motion[None])[0] @ self.local
        self.begun = [chunk.seen_from(motion) for chunk in self.begun]
        self.kept = deque(chunk.seen_from(motion) for chunk in self.kept)
        self.anchored = self.rollout.frames


@dataclass(frozen=True)
class Turn:
    """A session's next chunk, to be made with the camera moving at `velocity`.

    chunk: index of the chunk that the control is for, where that matters: refused for one that has begun, or is later
    """

    session: Session
    velocity: CameraVelocity
    fidelity: Fidelity = Fidelity()
    chunk: int | None = None


def conditions_of(chunk: Clean, intrinsics: Tensor, device: torch.device) -> Conditions:
    """What steers a chunk."""
    viewmats = torch.from_numpy(invert(chunk.poses)[None].astype(np.float32))
    cameras = Cameras.track(viewmats[:, 1:], intrinsics, viewmats[:, 0])
    actions = torch.from_numpy(from_poses(chunk.poses)[1:])[None]
    return Conditions(cameras=cameras, actions=actions, image=chunk.image).to(device)


def join_states(states: Sequence[State | None]) -> State | None:
    """Decoder states of streams as one of a batch; of streams that all are at their beginning, or none of them is."""
    present = [state for state in states if state is not None]
    return tuple(torch.cat(parts) for parts in zip(*present, strict=True)) if present else None


def start_picture(start: NDArray[np.uint8] | str | None, world: World) -> NDArray[np.uint8] | None:
    """What a session begins with, (y, x, 3) of the world's size: a picture given, one of the world's by name, or none.

    Raises SessionError for an unknown name and for what is no RGB picture.
    """
    if start is None:
        return None
    if isinstance(start, str):
        if start not in world.starts:
            raise SessionError(f"start image {start!r}: unknown, the model has {sorted(world.starts)}")
        return world.starts[start]
    if start.ndim != 3 or start.shape[2] != 3 or start.dtype != np.uint8 or start.size == 0:
        raise SessionError(f"start image: {start.dtype} of shape {start.shape}, expected uint8 (y, x, 3)")
    size = (world.card.width, world.card.height)
    return np.asarray(Image.fromarray(start).resize(size, Image.Resampling.BOX))
