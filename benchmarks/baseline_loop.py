"""Two slower ways to make the chunks that the engine makes, from the same weights, in the same dtype and attention.

`BaselineLoop` is the method of minWM's Wan inference (github.com/shengshu-ai/minWM), written from a description of it:
attention by position and by camera as two calls with a cache each, shifted when it is full, its ends read back from
the device; rotations in complex128, and projections for every token, made anew in every layer; a full forward for each
denoising step and one for the clean context. Its frames are decoded when the clip is complete: `decode_clip`.
Left out, in its favour: the prompt's embedding, repeated in every forward without use; x0 in float64; its slower norms.
`without_cache` computes every frame of the window again in every pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS
from minwm.errors import ConfigError, InputError
from minwm.models.conditions import Conditions
from minwm.models.context import History, Masked, attention
from minwm.models.layers import sinusoid, unpatchify
from minwm.models.layout import VideoAutoencoder
from minwm.models.prope import Cameras, invert
from minwm.models.transformer import Prompt, Transformer
from minwm.models.wan import Block, SelfAttention, Wan, WanPrompt

POSITIONS = 1024  # that the tables of rotations hold


class ShiftedCache:
    """Keys and values (b, tokens, h, d) of one layer and branch, oldest first; what is beside the sink moves."""

    def __init__(self, like: Tensor, tokens: int, sink: int) -> None:
        """like: keys (b, n, h, d) as they will come; sink: first tokens, which stay."""
        shape = (len(like), tokens, *like.shape[2:])
        self._keys, self._values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self._sink = sink
        self._stream_end, self._end = (torch.zeros((), dtype=torch.long, device=like.device) for _ in range(2))

    def update(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the stream's tokens from `start` on, again if they are its last ones; all that is there to be seen."""
        end = start + keys.shape[1]
        stored = int(self._end) + end - int(self._stream_end)
        evicted = max(0, stored - self._keys.shape[1])
        if evicted:
            kept = slice(self._sink, int(self._end) - evicted)
            moved = slice(self._sink + evicted, int(self._end))
            self._keys[:, kept] = self._keys[:, moved].clone()
            self._values[:, kept] = self._values[:, moved].clone()
        stored -= evicted
        self._keys[:, stored - keys.shape[1] : stored] = keys
        self._values[:, stored - keys.shape[1] : stored] = values
        self._stream_end.fill_(end)
        self._end.fill_(stored)
        return self._keys[:, :stored], self._values[:, :stored]


class BaselineLoop:
    """`batch` worlds that advance together, from latent frame 0 on; used as `ChunkRollout` is."""

    def __init__(self, model: Transformer, history: History, latent_shape: Sequence[int], *, batch: int = 1) -> None:
        """latent_shape: (c, y, x) of one latent frame. Raises ConfigError for other models and other conditions."""
        if not isinstance(model, Wan) or set(model.config.conditions) - {"camera_prope"}:
            raise ConfigError(f"model: {model.architecture}: expected a Wan steered by camera_prope, or by nothing")
        config, weight = model.config, model.patch_embedding.weight
        self._model, self._history = model, history
        self._grid = latent_shape[-2] // config.patch[0], latent_shape[-1] // config.patch[1]
        self._tokens = self._grid[0] * self._grid[1]
        self._tables = [rotations(width).to(weight.device) for width in config.axes]
        keys = weight.new_empty(batch, 0, config.heads, config.head_dim)
        capacity, sink = (history.sink + history.window) * self._tokens, history.sink * self._tokens
        branches = 2 if config.conditions else 1
        self._caches = [[ShiftedCache(keys, capacity, sink) for _ in range(branches)] for _ in range(config.layers)]
        self.frames = 0

    def denoise(
        self,
        noise: Tensor,
        prompt: Prompt,
        conditions: Conditions,
        levels: Sequence[float],
        renoise: Callable[[int], Tensor],
    ) -> Tensor:
        """The next chunk (b, f, c, y, x) from its noise. See `samplers.consistency` for the last two."""
        return samplers.consistency(
            lambda x, level: self.velocity(x, level, prompt, conditions), noise, levels, renoise
        )

    def commit(self, latents: Tensor, prompt: Prompt, conditions: Conditions) -> None:
        """A whole forward for its keys and values, and on past these frames."""
        self.velocity(latents, 0.0, prompt, conditions)
        self.frames += latents.shape[1]

    def velocity(self, x: Tensor, level: float, prompt: Prompt, conditions: Conditions) -> Tensor:
        """The model's velocity (b, f, c, y, x) of the next chunk at one level. Raises InputError past 1024 frames."""
        assert isinstance(prompt, WanPrompt)
        model, config = self._model, self._model.config
        if self.frames + x.shape[1] > POSITIONS:
            raise InputError(f"frames={self.frames + x.shape[1]}: expected at most {POSITIONS}, as the tables hold")
        dtype = model.patch_embedding.weight.dtype
        cameras = self._per_token(conditions.cameras, dtype) if config.conditions else None
        hidden = model.patch_embedding(x.to(dtype).transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # b f n dim
        timesteps = torch.full(x.shape[:2], level * TIMESTEPS, dtype=torch.float32, device=x.device)
        e = model.time_embedding(sinusoid(timesteps, config.frequencies).to(dtype))
        e0 = model.time_projection(e).unflatten(-1, (6, -1))
        for block, caches, text in zip(model.blocks, self._caches, prompt.layers, strict=True):
            hidden = self._block(block, caches, hidden, e0, text, cameras)
        return unpatchify(model.head(hidden, e), config.patch, *self._grid)

    def _per_token(self, cameras: Cameras | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Viewmats (b, f·n, 4, 4) and focal lengths (b, f·n, 2), as the model takes them."""
        if cameras is None:
            raise InputError("cameras: are missing, the model is steered by them")
        viewmats = cameras.viewmats.to(dtype).repeat_interleave(self._tokens, dim=1)
        focal = cameras.intrinsics[:, None, :2].to(dtype).expand(-1, viewmats.shape[1], -1)
        return viewmats, focal

    def _block(
        self,
        block: Block,
        caches: list[ShiftedCache],
        x: Tensor,
        e0: Tensor,
        text: tuple[Tensor, Tensor],
        cameras: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + e0).unsqueeze(3).unbind(2)
        frames = x.shape[1]
        y = block.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self._attend(block.self_attn, caches, y.flatten(1, 2), cameras).unflatten(1, (frames, -1))
        x = x + block.cross_attn(block.norm3(x).flatten(1, 2), text).unflatten(1, (frames, -1))
        return x + gate2 * block.ffn(block.norm2(x) * (1 + scale2) + shift2)

    def _attend(
        self, layer: SelfAttention, caches: list[ShiftedCache], x: Tensor, cameras: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x (b, f·n, dim) to (b, f·n, dim): by position, then by camera."""
        q, k = layer.norm_q(layer.q(x)).to(x.dtype), layer.norm_k(layer.k(x)).to(x.dtype)
        q, k, v = (y.unflatten(-1, (layer.heads, -1)) for y in (q, k, layer.v(x)))
        start = self.frames * self._tokens
        keys, values = caches[0].update(start, self._rotate(k), v)
        out = layer.o(attention(self._rotate(q), keys, values).flatten(2))
        if cameras is None:
            return out
        matrix, inverse = projections(*cameras)
        keys, values = caches[1].update(start, transform(k, inverse), transform(v, inverse))
        seen = transform(attention(transform(q, matrix.mT), keys, values), matrix)
        return out + layer.prope_o(seen.flatten(2))

    def _rotate(self, x: Tensor) -> Tensor:
        """Tokens x (b, f·n, h, d) of the next frames, stream by stream."""
        rows, columns = self._grid
        frames = x.shape[1] // self._tokens
        rotated = []
        for stream in x:
            axes = (
                self._tables[0][self.frames : self.frames + frames, None, None],
                self._tables[1][None, :rows, None],
                self._tables[2][None, None, :columns],
            )
            phases = torch.cat([axis.expand(frames, rows, columns, -1) for axis in axes], dim=-1).flatten(0, 2)
            pairs = torch.view_as_complex(stream.double().unflatten(-1, (-1, 2)))
            rotated.append(torch.view_as_real(pairs * phases[:, None]).flatten(-2))
        return torch.stack(rotated).to(x.dtype)


def rotations(width: int) -> Tensor:
    """Unit complex numbers (positions, width / 2) of one axis, complex128."""
    frequencies = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(POSITIONS, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def projections(viewmats: Tensor, focal: Tensor) -> tuple[Tensor, Tensor]:
    """P = lift(K)·viewmat and its inverse, (b, f·n, 4, 4) each."""
    diagonal = torch.cat([focal, torch.ones_like(focal)], dim=-1)
    return torch.diag_embed(diagonal) @ viewmats, invert(viewmats) @ torch.diag_embed(1 / diagonal)


def transform(x: Tensor, matrices: Tensor) -> Tensor:
    """Tokens x (b, n, h, d), every four channels mapped by the token's own matrix (b, n, 4, 4)."""
    return torch.einsum("bnij,bnhgj->bnhgi", matrices, x.unflatten(-1, (-1, 4))).flatten(-2)


def decode_clip(autoencoder: VideoAutoencoder, clip: Sequence[Tensor]) -> Tensor:
    """RGB frames (b, t, 3, y, x) of a clip's chunks, decoded at once."""
    frames, _ = autoencoder.decode(torch.cat(list(clip), dim=1))
    return frames


def whole_window(history: History) -> Masked:
    """The context of a pass over a window's frames, a chunk of which sees itself and the chunks before it."""
    end = -(-history.window // history.chunk) * history.chunk
    positions = range(end - history.window, end)
    sees = [[history.sees(history.chunk_end(query), key) for key in positions] for query in positions]
    return Masked(positions, torch.tensor(sees))


def without_cache(
    model: Transformer,
    context: Masked,
    past: Tensor,
    noise: Tensor,
    prompt: Prompt,
    conditions: Conditions,
    levels: Sequence[float],
    renoise: Callable[[int], Tensor],
) -> Tensor:
    """A chunk (b, f, c, y, x) from its noise and the clean frames before it, all of the window in every pass.

    context: `whole_window`; conditions: of all its frames
    """

    def predict(x: Tensor, level: float) -> Tensor:
        timesteps = torch.zeros(len(x), len(context.positions), device=x.device)
        timesteps[:, past.shape[1] :] = level * TIMESTEPS
        velocity = model(torch.cat([past, x], dim=1), timesteps, prompt, context, conditions)
        return velocity[:, past.shape[1] :]

    return samplers.consistency(predict, noise, levels, renoise)
