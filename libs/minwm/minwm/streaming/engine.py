"""Sessions on one device: worlds that go on chunk by chunk under live control, several in one forward pass.

A session's noise depends on its seed and the frame's index alone. Sessions with different poses, prompts, frame
counters and windows advance together where their steps are the same; a session's frames are then those of the unbatched
one but for rounding (matrix products round differently by batch size), and bit for bit those of the same batch. The
engine blocks while it computes and is called from one thread at a time; queues, credits and networks are the service's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS
from minwm.errors import SessionError
from minwm.geometry.live import CameraVelocity, advance
from minwm.models.autoencoder import PIXELS_PER_LATENT
from minwm.models.cache import Cached
from minwm.models.combined import join_conditions, join_prompts, together
from minwm.models.conditions import Conditions, first_image
from minwm.models.fused import fuse
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.rollout import ChunkRollout
from minwm.models.steady import SteadyPasses
from minwm.models.transformer import Prompt
from minwm.models.worlds import World
from minwm.randomness import generator
from minwm.streaming.prompts import SharedPrompts
from minwm.streaming.session import Clean, Session, Turn, conditions_of, join_states, start_picture
from minwm.streaming.stream import Chunk, Fidelity, StreamSpec

_FARTHEST = 1e30  # what float32 can square comes close


@dataclass(frozen=True)
class _Ready:
    """A turn whose input is checked: the chunk it is to make, still noise, and how."""

    turn: Turn
    levels: tuple[float, ...]
    poses: NDArray[np.float64]
    conditions: Conditions

    @property
    def session(self) -> Session:
        return self.turn.session

    @property
    def kind(self) -> tuple[object, ...]:
        """What is equal of turns that can be taken together."""
        session = self.session
        begins, waits, shows = session.rollout.frames == 0, session.pending is not None, session.decoder_state is None
        return self.levels, self.turn.fidelity.euler, begins, waits, shows


class StreamingEngine:
    """Runs up to `slots` sessions of one world model, whose memory is taken at once."""

    def __init__(
        self,
        world: World,
        slots: int,
        *,
        steps: int | None = None,
        fuse_context: bool = False,
        eight_bit_cache: bool = False,
        eight_bit_products: bool = False,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        """steps: denoising steps a chunk; the world's own default if not given.

        compiled: passes at full windows are, at the first one of each number of sessions (minwm.models.steady)
        eight_bit_cache: sessions of half the size, a little off (minwm.models.cache.EightBitCache)
        eight_bit_products: FP8, for Hopper GPUs, a little off (minwm.models.eight_bit); slow elsewhere
        fuse_context: a chunk whose context is not settled is written in one pass with the next one's first step: fewer
            passes in all, but on the path from action to frame. Not for models with a sink
        graphs: passes at full windows are captured as CUDA graphs, at the first one of each set of sessions

        Raises ConfigError for what the model or its device cannot do.
        """
        self.world = world
        self._model = fuse(world.backbone.model, eight_bit=eight_bit_products)
        self._steady = SteadyPasses(self._model, compiled=compiled, graphs=graphs) if compiled or graphs else None
        self._steps = steps or world.card.steps
        config = world.backbone.config
        config.sampling_levels(self._steps)
        self._chunk, self._history = config.history.chunk, config.history
        self._fuse = fuse_context and not config.history.sink
        self._intrinsics = torch.tensor([world.card.intrinsics])
        parameter = next(self._model.parameters())
        self._dtype, self.device = parameter.dtype, parameter.device
        self._eight_bit = eight_bit_cache
        self._free = [self._new_rollout() for _ in range(slots)]
        self._slots = slots
        self._cache_bytes = self._new_rollout().cache.geometry.bytes(self._dtype, eight_bit=eight_bit_cache)
        self._prompts = SharedPrompts(world.backbone, self._model)
        card = world.card
        self.spec = StreamSpec(
            model=card.name,
            height=card.height,
            width=card.width,
            fps=card.fps,
            frames_per_chunk=self._chunk * FRAMES_PER_LATENT,
            speeds=card.speeds,
            start_images=tuple(world.starts),
        )

    @property
    def free_slots(self) -> int:
        """Sessions that can still be opened."""
        return len(self._free)

    @property
    def bytes_per_session(self) -> int:
        """Memory of one session: its cache, the kept latents and the decoder's state."""
        c, y, x = self._latent_shape()
        frames = self._history.window + self._history.sink + self._chunk
        return self._cache_bytes + self._decoder_bytes + frames * c * y * x * self._dtype.itemsize

    @cached_property
    def _decoder_bytes(self) -> int:
        with torch.inference_mode():
            latents = torch.zeros(1, 1, *self._latent_shape(), dtype=self._dtype, device=self.device)
            _, state = self.world.autoencoder.decode(latents)
        return sum(part.nbytes for part in state)

    @torch.inference_mode()
    def open(self, *, seed: int, prompt: str = "", start_image: NDArray[np.uint8] | str | None = None) -> Session:
        """Start a world from a picture (given, or one of the model's by name), or from nothing but the prompt.

        Raises SessionError when no slot is free, the prompt is too long, or the picture is unknown or no RGB image.
        """
        picture = start_picture(start_image, self.world)
        session = self.new_session(prompt, seed)
        if picture is not None:
            self._begin_with(session, picture)
        return session

    @torch.inference_mode()
    def advance(self, turns: Sequence[Turn]) -> list[Chunk | SessionError]:
        """The next chunk of each session, in order; a SessionError in the place of a turn that cannot be taken.

        Turns are taken together where they can be, and none is disturbed by another's error.
        """
        results: list[Chunk | SessionError | None] = [None] * len(turns)
        groups: dict[tuple[object, ...], list[tuple[int, _Ready]]] = {}
        sessions = [turn.session for turn in turns if not turn.session.closed]
        self.settle([session for session in sessions if not self._fuse or self._moves(session)])
        seen: set[int] = set()
        for place, turn in enumerate(turns):
            try:
                if id(turn.session) in seen:
                    raise SessionError("the session is in this batch already, expected one chunk each")
                ready = self._prepare(turn)
            except SessionError as error:
                results[place] = error
                continue
            seen.add(id(turn.session))
            groups.setdefault(ready.kind, []).append((place, ready))
        for group in groups.values():
            made = self._make([ready for _, ready in group])
            for (place, _), result in zip(group, made, strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    @torch.inference_mode()
    def settle(self, sessions: Sequence[Session]) -> None:
        """Write the last chunks' clean context, off the action-to-frame path. What is written already is left alone."""
        waiting = [session for session in dict.fromkeys(sessions) if session.pending is not None]
        beginning = [session for session in waiting if session.rollout.frames == 0]
        for group in (beginning, [session for session in waiting if session not in beginning]):
            if group:
                self._commit(group)

    @torch.inference_mode()
    def change_prompt(self, session: Session, prompt: str) -> None:
        """Go on under another prompt: the context of the kept window is made again as if it had always been this one.

        Raises SessionError for a closed session or a prompt that is too long.
        """
        self._require_open(session)
        text = self._prompts.borrow(prompt)
        self.settle([session])
        self._prompts.give_back(session.caption)
        session.caption, session.prompt = prompt, text
        kept = [*session.begun, *(chunk for chunk in session.kept if chunk.start >= self._history.sink)]
        if kept:
            chunks = [(chunk.start, chunk.latents, self._conditions(chunk)) for chunk in kept]
            session.rollout.rebuild(chunks, text)

    def close(self, session: Session) -> None:
        """Free the session's slot. Closing twice is allowed."""
        if not session.closed:
            session.closed = True
            self._prompts.give_back(session.caption)
            session.rollout.reset()
            self._free.append(session.rollout)

    def new_session(self, prompt: str, seed: int) -> Session:
        """A session in a slot of its own, of which nothing is made yet. Raises SessionError as `open` does."""
        if not self._free:
            raise SessionError(f"no slot is free: all {self._slots} are in use")
        text = self._prompts.borrow(prompt)
        return Session(self._free.pop(), prompt, text, seed, self._history.window)

    def _make(self, group: Sequence[_Ready]) -> list[Chunk | SessionError]:
        """One chunk of each session of a group, in one pass a step."""
        started = time.perf_counter()
        latents = self._denoise(group)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # for an honest time; the frames are waited for in any case
        denoised = time.perf_counter()
        state = join_states([ready.session.decoder_state for ready in group])
        frames, state = self.world.autoencoder.decode(latents, state)
        pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
        sound = latents.flatten(1).isfinite().all(1).tolist()
        seconds = denoised - started, time.perf_counter() - denoised
        results: list[Chunk | SessionError] = []
        for row, ready in enumerate(group):
            if not sound[row]:
                results.append(SessionError(f"chunk {ready.session.chunks}: the model's output is not finite"))
                continue
            own = tuple(part[row : row + 1].clone() for part in state)
            results.append(self._shown(ready, latents[row : row + 1].clone(), own, pixels[row].copy(), seconds))
        return results

    def _shown(
        self,
        ready: _Ready,
        latents: Tensor,
        state: tuple[Tensor, ...],
        frames: NDArray[np.uint8],
        seconds: tuple[float, float],
    ) -> Chunk:
        session = ready.session
        session.pending = Clean(latents, session.rollout.frames, ready.poses, window=ready.turn.fidelity.window)
        session.decoder_state, session.local = state, ready.poses[-1]
        session.chunks += 1
        return Chunk(index=session.chunks - 1, frames=frames, denoise_seconds=seconds[0], decode_seconds=seconds[1])

    def _denoise(self, group: Sequence[_Ready]) -> Tensor:
        """Latents (b, f, c, y, x) of the sessions' next chunks."""
        sessions, levels = [ready.session for ready in group], group[0].levels
        prompt = join_prompts([session.prompt for session in sessions])
        conditions = join_conditions([ready.conditions for ready in group])
        first = None
        if sessions[0].pending is not None:
            first = self._first_step_with_context(group, prompt, conditions)
        windows = [ready.turn.fidelity.window for ready in group]

        def predict(x: Tensor, level: float) -> Tensor:
            if first is not None and level == levels[0]:
                return first
            rollouts = zip(sessions, group, windows, strict=True)
            contexts = [s.rollout.context(ready.conditions, window) for s, ready, window in rollouts]
            return self._velocity(x, level, prompt, contexts, conditions)

        def noise(step: int) -> Tensor:
            return torch.cat([self._noise(s.seed, s.frames, self._chunk, step) for s in sessions])

        if group[0].turn.fidelity.euler:
            return samplers.euler(predict, noise(0), levels)
        return samplers.consistency(predict, noise(0), levels, lambda step: noise(step + 1))

    def _first_step_with_context(self, group: Sequence[_Ready], prompt: Prompt, conditions: Conditions) -> Tensor:
        """The velocity at the first level, of passes that also write the clean context of the chunks before."""
        sessions, contexts, last = [ready.session for ready in group], [], []
        for ready in group:
            assert ready.session.pending is not None
            last.append(self._conditions(ready.session.pending))
            windows = ready.session.pending.window, ready.turn.fidelity.window
            contexts.append(ready.session.rollout.context_of_both(last[-1], *windows))
        clean = torch.cat([session.pending.latents for session in sessions if session.pending is not None])
        noise = torch.cat([self._noise(s.seed, s.frames, self._chunk, 0) for s in sessions])
        level = torch.tensor([0.0] * self._chunk + [group[0].levels[0]] * self._chunk, device=self.device)
        both = join_conditions([join_conditions(last), conditions], dim=1)
        velocity = self._model(
            torch.cat([clean, noise], dim=1),
            (level * TIMESTEPS).expand(len(group), -1),
            prompt,
            together(contexts),
            both,
        )
        for session, steering in zip(sessions, last, strict=True):
            self._committed(session, steering)
        return velocity[:, self._chunk :]  # type: ignore[no-any-return]

    def _commit(self, sessions: Sequence[Session]) -> None:
        """Write the pending chunks of sessions that all begin, or none of which does."""
        chunks = [session.pending for session in sessions if session.pending is not None]
        conditions = [self._conditions(chunk) for chunk in chunks]
        each = zip(sessions, conditions, chunks, strict=True)
        contexts = [session.rollout.context(steering, chunk.window) for session, steering, chunk in each]
        prompt = join_prompts([session.prompt for session in sessions])
        latents = torch.cat([chunk.latents for chunk in chunks])
        self._velocity(latents, 0.0, prompt, contexts, join_conditions(conditions))
        for session, steering in zip(sessions, conditions, strict=True):
            self._committed(session, steering)

    def _committed(self, session: Session, conditions: Conditions) -> None:
        """The session's pending chunk is written."""
        assert session.pending is not None
        session.rollout.committed(conditions)
        session.remember(session.pending, self._history.sink)
        session.pending = None

    def _velocity(
        self, x: Tensor, level: float, prompt: Prompt, contexts: Sequence[Cached], conditions: Conditions
    ) -> Tensor:
        timesteps = torch.full(x.shape[:2], level * TIMESTEPS, dtype=torch.float32, device=x.device)
        if self._steady is not None and self._steady.take(contexts):
            return self._steady(x, timesteps, prompt, contexts, conditions)
        return self._model(x, timesteps, prompt, together(contexts), conditions)  # type: ignore[no-any-return]

    def _prepare(self, turn: Turn) -> _Ready:
        """Check a turn, and move the camera over its chunk. Raises SessionError; the session is as it was."""
        session, fidelity = turn.session, turn.fidelity
        self._require_open(session)
        if turn.chunk not in (None, session.chunks):
            state = "has begun already" if turn.chunk < session.chunks else "is not next"
            raise SessionError(f"control for chunk {turn.chunk}: it {state}, expected one for chunk {session.chunks}")
        levels = self.levels(fidelity)
        window = fidelity.window
        if window is not None and not self._chunk <= window <= self._history.window:
            raise SessionError(f"window={window}: expected from {self._chunk} to {self._history.window} latent frames")
        if session.pending is None and self._moves(session):
            session.move_origin_here()
        poses = self._poses(session, turn.velocity)
        if not (np.abs(poses) < _FARTHEST).all():
            raise SessionError(f"chunk {session.chunks}: {turn.velocity} takes the camera to a pose that is not finite")
        return _Ready(turn, levels, poses, self._conditions(Clean(torch.empty(0), session.frames, poses)))

    def levels(self, fidelity: Fidelity) -> tuple[float, ...]:
        """The noise levels of a chunk. Raises SessionError for a number of steps that the model was not made for."""
        offered, steps = self.world.backbone.config.levels, fidelity.steps or self._steps
        if steps not in offered:
            raise SessionError(f"steps={steps}: expected one of {sorted(offered)}, which the model was trained for")
        return offered[steps]

    def _poses(self, session: Session, velocity: CameraVelocity) -> NDArray[np.float64]:
        """(1 + f, 4, 4); a world that starts from nothing starts at rest in its first frame."""
        poses = [session.local]
        for offset in range(self._chunk):
            moves = session.frames + offset > 0
            seconds = FRAMES_PER_LATENT / self.spec.fps
            poses.append(advance(poses[-1], velocity, seconds) if moves else poses[-1])
        return np.stack(poses)

    def _conditions(self, chunk: Clean) -> Conditions:
        return conditions_of(chunk, self._intrinsics, self.device)

    def _moves(self, session: Session) -> bool:
        """Whether the session's origin is to follow the camera: far behind it, and not moved for a window."""
        return session.strayed and session.frames >= session.anchored + self._history.window

    def _require_open(self, session: Session) -> None:
        if session.closed:
            raise SessionError("the session is closed")

    def _latent_shape(self) -> tuple[int, int, int]:
        card = self.world.card
        channels = self.world.backbone.config.architecture.channels
        return channels, card.height // PIXELS_PER_LATENT, card.width // PIXELS_PER_LATENT

    def _new_rollout(self) -> ChunkRollout:
        return ChunkRollout(self._model, self._history, self._latent_shape(), eight_bit=self._eight_bit)

    def _begin_with(self, session: Session, picture: NDArray[np.uint8]) -> None:
        """Fill the first chunk with the picture: each of its latent frames is the picture four times."""
        frame = torch.from_numpy(picture.copy()).to(self.device).permute(2, 0, 1).to(self._dtype) / 255
        pixels = frame.expand(1, self._chunk * FRAMES_PER_LATENT, -1, -1, -1)
        latents, _ = self.world.autoencoder.encode(pixels)
        _, session.decoder_state = self.world.autoencoder.decode(latents)
        still = np.eye(4)[None].repeat(1 + self._chunk, 0)
        session.pending = Clean(latents, 0, still, first_image(latents[:, 0]))
        self._commit([session])

    def _noise(self, seed: int, first: int, frames: int, step: int) -> Tensor:
        """(1, frames, c, y, x), a function of the seed, the frame's index and the step."""
        shape = self._latent_shape()
        drawn = [torch.randn(shape, generator=generator(seed, first + i, step)) for i in range(frames)]
        return torch.stack(drawn)[None].to(self.device, self._dtype)
