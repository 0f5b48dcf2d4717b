"""Generation of a world chunk by chunk from a cache: the one loop that self-rollout and serving share.

`denoise` makes the next chunk; `commit` writes its clean keys and values, which later chunks see.
Between the two nothing of the past changes, so a chunk can be shown before it is committed. Who advances several worlds
in one pass takes each one's `context`, and tells it with `committed`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS
from minwm.errors import InputError
from minwm.models.cache import Cached, EightBitCache, KVCache
from minwm.models.combined import InTurn
from minwm.models.conditions import Conditions
from minwm.models.context import History
from minwm.models.prope import Cameras, invert
from minwm.models.transformer import Prompt, Transformer


class ChunkRollout:
    """`batch` worlds that advance together, from latent frame 0 on."""

    def __init__(
        self,
        model: Transformer,
        history: History,
        latent_shape: Sequence[int],
        *,
        batch: int = 1,
        eight_bit: bool = False,
    ) -> None:
        """latent_shape: (c, y, x) of one latent frame; eight_bit: keep half as many bytes, see EightBitCache."""
        rows, columns = latent_shape[-2:]
        parameter = next(model.parameters())
        self._model = model
        self._history = history
        self._device = parameter.device
        patch = model.architecture.patch
        self._grid = rows // patch[0], columns // patch[1]
        geometry = model.architecture.cache_geometry(rows, columns, history)
        kind = EightBitCache if eight_bit else KVCache
        self.cache = kind(geometry, batch, parameter.dtype, parameter.device)
        self.frames = 0
        """Latent frames committed so far."""
        self.sinks: Cameras | None = None
        """Cameras of the sink's frames, as far as they are committed."""
        self._placed = 0

    def reset(self) -> None:
        """Begin anew at frame 0; the memory stays."""
        self.cache.reset()
        self.frames, self.sinks, self._placed = 0, None, 0

    def denoise(
        self,
        noise: Tensor,
        prompt: Prompt,
        conditions: Conditions,
        levels: Sequence[float],
        renoise: Callable[[int], Tensor],
        *,
        exit_step: int | None = None,
    ) -> Tensor:
        """The next chunk (b, f, c, y, x) from its noise. See `samplers.consistency` for the last three."""

        def predict(x: Tensor, level: float) -> Tensor:
            return self.velocity(x, level, prompt, conditions)

        return samplers.consistency(predict, noise, levels, renoise, exit_step=exit_step)

    def denoise_ode(self, noise: Tensor, prompt: Prompt, conditions: Conditions, levels: Sequence[float]) -> Tensor:
        """The next chunk as a many-step model that is not distilled makes it."""
        return samplers.euler(lambda x, level: self.velocity(x, level, prompt, conditions), noise, levels)

    @torch.no_grad()
    def commit(self, latents: Tensor, prompt: Prompt, conditions: Conditions) -> None:
        """Write the clean keys and values of the next frames (b, f, c, y, x), and move on past them."""
        self.velocity(latents, 0.0, prompt, conditions)
        self.committed(conditions)

    def velocity(self, x: Tensor, level: float, prompt: Prompt, conditions: Conditions) -> Tensor:
        """The model's velocity (b, f, c, y, x) of the next chunk at one level, given what is committed."""
        if x.shape[1] != self._history.chunk:
            raise InputError(f"frames={x.shape[1]}: expected one chunk, {self._history.chunk} latent frames")
        timesteps = torch.full(x.shape[:2], level * TIMESTEPS, dtype=torch.float32, device=x.device)
        context = self.context(conditions)
        return self._model(x, timesteps, prompt, context, conditions)  # type: ignore[no-any-return]

    def context(self, conditions: Conditions, window: int | None = None) -> Cached:
        """The next chunk's context, with the sink placed as its cameras ask; `window` latent frames are attended to."""
        chunk, sink = self._history.chunk, self._history.sink
        if sink and self.frames >= sink and self._placed != self.frames:
            self._place_sinks(conditions.cameras)
        return self.cache.context(self.frames, chunk, window)

    def context_of_both(self, last: Conditions, last_window: int | None = None, window: int | None = None) -> InTurn:
        """Of one pass over the last chunk, clean and not yet committed, and the chunk after it.

        last: what steers the last chunk; each of the two attends to its own window. Raises InputError where there is a
        sink behind the window: it is placed afresh between the two, which therefore are two passes
        """
        history, end = self._history, self.frames + 2 * self._history.chunk
        if history.sink and (end > history.sink + history.window or history.sink_reach is not None):
            raise InputError(f"sink={history.sink}: expected none, or chunks inside the first window, for one pass")
        first = self.context(last, last_window)
        return InTurn([first, self.cache.following(first, history.chunk, window)])

    def committed(self, conditions: Conditions) -> None:
        """The next chunk's clean keys and values are written: move on past it."""
        chunk, sink = self._history.chunk, self._history.sink
        if self.frames < sink and conditions.cameras is not None:
            new = conditions.cameras.frames(0, min(chunk, sink - self.frames))
            old = self.sinks
            self.sinks = new if old is None else _joined(old, new)
        self.frames += chunk

    @torch.no_grad()
    def rebuild(self, chunks: Sequence[tuple[int, Tensor, Conditions]], prompt: Prompt) -> None:
        """Write the context anew from clean chunks (first frame, latents, conditions), in order, under a prompt.

        They are the sink's and the last ones, of which each sees those that are given before it.
        """
        beginning, end, sinks = self.frames, self.frames, self.sinks
        self.cache.reset()
        for start, latents, conditions in chunks:
            if start != end:
                beginning, end = start, start
                self.cache.skip_to(start)
            self.frames, end = start, start + latents.shape[1]
            context = self.context(conditions, min(end - beginning, self._history.window))
            timesteps = torch.zeros(latents.shape[:2], device=latents.device)
            self._model(latents, timesteps, prompt, context, conditions)
        self.frames, self.sinks, self._placed = end, sinks, 0

    def move_world(self, motion: Tensor) -> None:
        """Move the world's origin by rigid motions (b, 4, 4): from now on cameras V are given as V·motion."""
        self.cache.move_world(motion)
        if self.sinks is not None:
            viewmats = (self.sinks.viewmats.double() @ motion[:, None].double()).to(self.sinks.viewmats.dtype)
            self.sinks = Cameras(viewmats, self.sinks.intrinsics, self.sinks.motions)

    def _place_sinks(self, now: Cameras | None) -> None:
        """For the next chunk: just before the window where they are behind it, no farther than they may be."""
        history = self._history
        before = self.frames + history.chunk - history.window - history.sink
        positions = tuple(max(frame, before + frame) for frame in range(history.sink))
        inverse = None
        if self.sinks is not None and now is not None:
            inverse = within_reach(self.sinks, now, history.sink_reach).projection.inverse
        self.cache.place_sinks(self._model.rotation((positions,), *self._grid, self._device), inverse)
        self._placed = self.frames


def within_reach(sinks: Cameras, now: Cameras, reach: float | None) -> Cameras:
    """The sinks' cameras, each brought to at most `reach` from the last of the chunk's, along the line between them."""
    if reach is None:
        return sinks
    centres, here = (invert(cameras.viewmats.double())[..., :3, 3] for cameras in (sinks, now))
    away = centres - here[:, -1:]
    far = away.norm(dim=-1, keepdim=True).clamp_min(reach)
    moved = here[:, -1:] + away * (reach / far)
    kept = torch.where(far > reach, moved, centres)
    viewmats = sinks.viewmats.double()
    shifted = viewmats.clone()
    shifted[..., :3, 3:] = -(viewmats[..., :3, :3] @ kept.unsqueeze(-1))
    return Cameras(shifted.to(sinks.viewmats.dtype), sinks.intrinsics, sinks.motions)


def _joined(first: Cameras, second: Cameras) -> Cameras:
    """Frames after frames."""
    return Cameras(
        torch.cat([first.viewmats, second.viewmats], dim=1),
        first.intrinsics,
        torch.cat([first.motions, second.motions], dim=1),
    )
