"""Generation of a world chunk by chunk from a cache: the one loop that self-rollout and serving share.

`denoise` makes the next chunk; `commit` writes its clean keys and values, which later chunks see.
Between the two nothing of the past changes, so a chunk can be shown before it is committed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS
from minwm.errors import InputError
from minwm.models.cache import KVCache
from minwm.models.conditions import Conditions
from minwm.models.context import History
from minwm.models.transformer import Prompt, Transformer


class ChunkRollout:
    """`batch` worlds that advance together, from latent frame 0 on."""

    def __init__(self, model: Transformer, history: History, latent_shape: Sequence[int], *, batch: int = 1) -> None:
        """latent_shape: (c, y, x) of one latent frame."""
        rows, columns = latent_shape[-2:]
        parameter = next(model.parameters())
        self._model = model
        self._history = history
        geometry = model.architecture.cache_geometry(rows, columns, history)
        self._cache = KVCache(geometry, batch, parameter.dtype, parameter.device)
        self.frames = 0
        """Latent frames committed so far."""

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
        self.frames += latents.shape[1]

    def velocity(self, x: Tensor, level: float, prompt: Prompt, conditions: Conditions) -> Tensor:
        """The model's velocity (b, f, c, y, x) of the next chunk at one level, given what is committed."""
        if x.shape[1] != self._history.chunk:
            raise InputError(f"frames={x.shape[1]}: expected one chunk, {self._history.chunk} latent frames")
        timesteps = torch.full(x.shape[:2], level * TIMESTEPS, dtype=torch.float32, device=x.device)
        context = self._cache.context(self.frames, x.shape[1])
        return self._model(x, timesteps, prompt, context, conditions)  # type: ignore[no-any-return]
