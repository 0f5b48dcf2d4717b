"""The Wan transformer against a second one, written plainly in float64 from the technical report and state-dict names.

No module of ours takes part: weights come out of the state dict, tokens are visited one by one.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full
from minwm.models.prope import Cameras

pytestmark = pytest.mark.parity

NewBackbone = Callable[..., Backbone]
Weights = dict[str, Tensor]
HEADS, HEAD_DIM, EPS = 2, 16, 1e-6


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One stream's tokens (n, d), head by head."""
    heads = []
    for head in range(HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(HEAD_DIM), dim=-1)
        heads.append(weights @ v[:, part])
    return torch.cat(heads, dim=-1)


def rope(x: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
    """Tokens (n, d) at (frame, row, column); head size 16 is split 8, 4, 4."""
    out = x.clone()
    for token, place in enumerate(places):
        for head in range(HEADS):
            channel = head * HEAD_DIM
            for position, width in zip(place, (8, 4, 4), strict=True):
                for i in range(width // 2):
                    angle = position / 10000 ** (2 * i / width)
                    a, b = x[token, channel], x[token, channel + 1]
                    out[token, channel] = a * math.cos(angle) - b * math.sin(angle)
                    out[token, channel + 1] = a * math.sin(angle) + b * math.cos(angle)
                    channel += 2
    return out


def by_groups_of_four(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """Each token's channels (n, d), four at a time, times its own matrix."""
    rows = [torch.cat([matrix @ part for part in row.split(4)]) for row, matrix in zip(x, matrices, strict=True)]
    return torch.stack(rows)


def self_attention(w: Weights, name: str, x: Tensor, places: list[tuple[int, int, int]], p: list[Tensor]) -> Tensor:
    q = rms_norm(w, f"{name}.norm_q", linear(w, f"{name}.q", x))
    k = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.k", x))
    v = linear(w, f"{name}.v", x)
    out = linear(w, f"{name}.o", attend(rope(q, places), rope(k, places), v))
    if not p:
        return out
    inverse = [torch.linalg.inv(matrix) for matrix in p]
    seen = attend(
        by_groups_of_four(q, [matrix.T for matrix in p]), by_groups_of_four(k, inverse), by_groups_of_four(v, inverse)
    )
    return out + linear(w, f"{name}.prope_o", by_groups_of_four(seen, p))


def cross_attention(w: Weights, name: str, x: Tensor, text: Tensor) -> Tensor:
    q = rms_norm(w, f"{name}.norm_q", linear(w, f"{name}.q", x))
    k = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.k", text))
    return linear(w, f"{name}.o", attend(q, k, linear(w, f"{name}.v", text)))


def sinusoid(timestep: float) -> Tensor:
    angles = [timestep * 10000 ** (-i / 16) for i in range(16)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)


def plain_wan(w: Weights, latents: Tensor, timesteps: Tensor, text: Tensor, p: list[Tensor]) -> Tensor:
    """One stream: latents (f, c, y, x), timesteps (f,), bytes (l,), a projection P per frame or none."""
    frames, _, height, width = latents.shape
    places = [(f, y, x) for f in range(frames) for y in range(height // 2) for x in range(width // 2)]
    x = (
        torch.stack(
            [
                torch.einsum(
                    "cij,dcij->d",
                    latents[f, :, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2],
                    w["patch_embedding.weight"][:, :, 0],
                )
                for f, y, z in places
            ]
        )
        + w["patch_embedding.bias"]
    )
    words = linear(w, "text_embedding.2", gelu(linear(w, "text_embedding.0", w["byte_embedding.weight"][text])))
    e = torch.stack([sinusoid(float(t)) for t in timesteps])
    e = linear(w, "time_embedding.2", silu(linear(w, "time_embedding.0", e)))
    e0 = linear(w, "time_projection.1", silu(e)).reshape(frames, 6, -1)
    of_token = torch.tensor([f for f, _, _ in places])
    matrices = [p[f] for f, _, _ in places] if p else []
    for block in range(2):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (w[f"{name}.modulation"] + e0)[of_token].unbind(1)
        y = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self_attention(w, f"{name}.self_attn", y, places, matrices)
        y = layer_norm(x) * w[f"{name}.norm3.weight"] + w[f"{name}.norm3.bias"]
        x = x + cross_attention(w, f"{name}.cross_attn", y, words)
        y = layer_norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(w, f"{name}.ffn.2", gelu(linear(w, f"{name}.ffn.0", y)))
    shift, scale = (w["head.modulation"] + e[:, None])[of_token].unbind(1)
    x = linear(w, "head.head", layer_norm(x) * (1 + scale) + shift)
    out = torch.zeros_like(latents)
    for token, (f, y, z) in zip(x, places, strict=True):
        for i in range(2):
            for j in range(2):
                out[f, :, 2 * y + i, 2 * z + j] = token.reshape(2, 2, -1)[i, j]
    return out


@pytest.mark.parametrize("with_cameras", [False, True], ids=["no camera", "camera"])
@torch.no_grad()
def test_forward_equals_the_plain_float64_one(
    new_backbone: NewBackbone, new_cameras: Callable[[int, int], Cameras], with_cameras: bool
) -> None:
    torch.manual_seed(0)
    model = new_backbone(conditions=("camera_prope",) if with_cameras else ()).model
    latents, timesteps = torch.randn(2, 3, 4, 4, 6), 1000 * torch.rand(2, 3)
    text = torch.randint(1, 257, (2, 12))
    text[1, 5:] = 0
    cameras = new_cameras(2, 3) if with_cameras else None
    got = model(latents, timesteps, model.prompt(text), Full(3), Conditions(cameras))

    weights = {name: value.double() for name, value in model.state_dict().items()}
    for stream in range(2):
        p: list[Tensor] = []
        if cameras is not None:
            fx, fy, _, _ = cameras.intrinsics[stream].tolist()
            k = torch.diag(torch.tensor([fx, fy, 1.0, 1.0], dtype=torch.float64))
            p = [k @ viewmat for viewmat in cameras.viewmats[stream].double()]
        expected = plain_wan(weights, latents[stream].double(), timesteps[stream].double(), text[stream], p)
        torch.testing.assert_close(got[stream].double(), expected, rtol=0, atol=1e-4)


def test_the_patch_embedding_is_the_convolution_that_its_weights_are_named_for(tiny_backbone: Backbone) -> None:
    torch.manual_seed(0)
    model, latents = tiny_backbone.model, torch.randn(2, 3, 4, 4, 6)
    convolved = model.patch_embedding(latents.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(model._embed_patches(latents), convolved, rtol=0, atol=1e-5)


def test_state_dict_names_are_the_official_ones(tiny_backbone: Backbone) -> None:
    attention = [f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")]
    attention += ["norm_q.weight", "norm_k.weight"]
    block = ["modulation", "norm3.weight", "norm3.bias"]
    block += [f"self_attn.{name}" for name in [*attention, "prope_o.weight", "prope_o.bias"]]
    block += [f"cross_attn.{name}" for name in attention]
    block += [f"ffn.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    whole = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    whole += ["time_projection.1", "head.head"]
    names = {f"{name}.{kind}" for name in whole for kind in ("weight", "bias")} | {"head.modulation"}
    names |= {f"blocks.{number}.{name}" for number in range(2) for name in block}
    names |= {"byte_embedding.weight"}  # ours: presets that embed text themselves
    assert set(tiny_backbone.model.state_dict()) == names
