"""Sessions: worlds that go on chunk by chunk under live control.

A session is a cache slot, a camera pose, a frame counter, a seed, the prompt's keys and values, and the
decoder's state. Its noise depends on its seed and the frame's index alone. The engine blocks while it
computes and is called from one thread at a time; queues, credits and networks are the service's.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minwm.errors import SessionError
from minwm.geometry.actions import from_poses
from minwm.geometry.camera import invert
from minwm.geometry.live import CameraVelocity, Speeds, advance
from minwm.models.autoencoder import PIXELS_PER_LATENT, State
from minwm.models.conditions import Conditions, first_image
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Prompt
from minwm.models.worlds import World
from minwm.randomness import generator


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What a client has to know of the stream."""

    model: str
    height: int
    width: int
    fps: float
    frames_per_chunk: int
    speeds: Speeds
    start_images: tuple[str, ...]

    @property
    def chunk_seconds(self) -> float:
        """Playing time of one chunk."""
        return self.frames_per_chunk / self.fps


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """frames (t, y, x, 3) uint8, and how long making them took."""

    index: int
    frames: NDArray[np.uint8]
    denoise_seconds: float
    decode_seconds: float


class Session:
    """One running world. Made by `StreamingEngine.open`; opaque to everybody else."""

    def __init__(self, rollout: ChunkRollout, prompt: Prompt, seed: int) -> None:
        self.rollout, self.prompt, self.seed = rollout, prompt, seed
        self.pose = np.eye(4)
        self.chunks = 0
        self.decoder_state: State | None = None
        self.pending: tuple[Tensor, Conditions] | None = None
        """A chunk that was shown but not yet written to the cache."""
        self.closed = False


class StreamingEngine:
    """Runs up to `slots` sessions of one world model."""

    def __init__(self, world: World, slots: int, *, steps: int | None = None) -> None:
        """steps: denoising steps a chunk; the world's own default if not given."""
        self._world = world
        self._slots = slots
        self._open = 0
        self._levels = world.backbone.config.sampling_levels(steps or world.card.steps)
        self._intrinsics = torch.tensor([world.card.intrinsics])
        self._dtype = next(world.backbone.model.parameters()).dtype
        card = world.card
        self.spec = StreamSpec(
            model=card.name,
            height=card.height,
            width=card.width,
            fps=card.fps,
            frames_per_chunk=world.backbone.config.history.chunk * FRAMES_PER_LATENT,
            speeds=card.speeds,
            start_images=tuple(world.starts),
        )

    @property
    def free_slots(self) -> int:
        """Sessions that can still be opened."""
        return self._slots - self._open

    @torch.inference_mode()
    def open(self, *, seed: int, prompt: str = "", start_image: NDArray[np.uint8] | str | None = None) -> Session:
        """Start a world from a picture (given, or one of the model's by name), or from nothing but the prompt.

        Raises SessionError when no slot is free, or the picture is unknown or no RGB image.
        """
        if self.free_slots == 0:
            raise SessionError(f"no slot is free: all {self._slots} are in use")
        picture = self._picture(start_image)
        model, config = self._world.backbone.model, self._world.backbone.config
        text = self._world.backbone.encode([prompt])
        rollout = ChunkRollout(model, config.history, self._latent_shape())
        session = Session(rollout, model.prompt(text), seed)
        if picture is not None:
            self._begin_with(session, picture)
        self._open += 1
        return session

    @torch.inference_mode()
    def advance(self, session: Session, velocity: CameraVelocity) -> Chunk:
        """The next chunk, with the camera moving at `velocity`. Raises SessionError for a closed session."""
        if session.closed:
            raise SessionError("the session is closed")
        self.settle(session)
        started = time.perf_counter()
        chunk = self._world.backbone.config.history.chunk
        conditions = self._move(session, velocity, chunk)
        first = session.rollout.frames
        latents = session.rollout.denoise(
            self._noise(session.seed, first, chunk, 0),
            session.prompt,
            conditions,
            self._levels,
            lambda step: self._noise(session.seed, first, chunk, step + 1),
        )
        denoised = time.perf_counter()
        frames = self._decode(session, latents)
        session.pending = (latents, conditions)
        session.chunks += 1
        return Chunk(
            index=session.chunks - 1,
            frames=frames,
            denoise_seconds=denoised - started,
            decode_seconds=time.perf_counter() - denoised,
        )

    @torch.inference_mode()
    def settle(self, session: Session) -> None:
        """Write the last chunk's clean context, off the action-to-frame path. Does nothing when it is written."""
        if session.pending is not None:
            latents, conditions = session.pending
            session.rollout.commit(latents, session.prompt, conditions)
            session.pending = None

    def close(self, session: Session) -> None:
        """Free the session's slot. Closing twice is allowed."""
        if not session.closed:
            session.closed = True
            self._open -= 1

    def _latent_shape(self) -> tuple[int, int, int]:
        card = self._world.card
        channels = self._world.backbone.config.architecture.channels
        return channels, card.height // PIXELS_PER_LATENT, card.width // PIXELS_PER_LATENT

    def _picture(self, start: NDArray[np.uint8] | str | None) -> NDArray[np.uint8] | None:
        if start is None:
            return None
        if isinstance(start, str):
            if start not in self._world.starts:
                raise SessionError(f"start image {start!r}: unknown, the model has {sorted(self._world.starts)}")
            return self._world.starts[start]
        if start.ndim != 3 or start.shape[2] != 3 or start.dtype != np.uint8 or start.size == 0:
            raise SessionError(f"start image: {start.dtype} of shape {start.shape}, expected uint8 (y, x, 3)")
        size = (self.spec.width, self.spec.height)
        return np.asarray(Image.fromarray(start).resize(size, Image.Resampling.BOX))

    def _begin_with(self, session: Session, picture: NDArray[np.uint8]) -> None:
        """Fill the first chunk with the picture: each of its latent frames is the picture four times."""
        chunk = self._world.backbone.config.history.chunk
        frame = torch.from_numpy(picture.copy()).permute(2, 0, 1).to(self._dtype) / 255
        pixels = frame.expand(1, chunk * FRAMES_PER_LATENT, -1, -1, -1)
        latents, _ = self._world.autoencoder.encode(pixels)
        _, session.decoder_state = self._world.autoencoder.decode(latents)
        conditions = self._conditions(np.eye(4)[None].repeat(1 + chunk, 0), first_image(latents[:, 0]))
        session.rollout.commit(latents, session.prompt, conditions)

    def _move(self, session: Session, velocity: CameraVelocity, frames: int) -> Conditions:
        """Integrate the pose over the chunk; a world that starts from nothing starts at rest in its first frame."""
        poses = [session.pose]
        for offset in range(frames):
            if session.rollout.frames + offset > 0:
                session.pose = advance(session.pose, velocity, FRAMES_PER_LATENT / self.spec.fps)
            poses.append(session.pose)
        return self._conditions(np.stack(poses))

    def _conditions(self, poses: NDArray[np.float64], image: Tensor | None = None) -> Conditions:
        """What steers the frames whose poses (1 + f, 4, 4) these are, the first one being that of the frame before."""
        viewmats = torch.from_numpy(invert(poses)[None].astype(np.float32))
        return Conditions(
            cameras=Cameras.track(viewmats[:, 1:], self._intrinsics, viewmats[:, 0]),
            actions=torch.from_numpy(from_poses(poses)[1:])[None],
            image=image,
        )

    def _noise(self, seed: int, first: int, frames: int, step: int) -> Tensor:
        """(1, frames, c, y, x), a function of the seed, the frame's index and the step."""
        shape = self._latent_shape()
        drawn = [torch.randn(shape, generator=generator(seed, first + i, step)) for i in range(frames)]
        return torch.stack(drawn)[None].to(self._dtype)

    def _decode(self, session: Session, latents: Tensor) -> NDArray[np.uint8]:
        frames, session.decoder_state = self._world.autoencoder.decode(latents, session.decoder_state)
        pixels = (frames[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
