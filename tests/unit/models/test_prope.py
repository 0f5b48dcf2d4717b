"""PRoPE: only relative cameras matter, and one attention call computes both branches."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import InputError
from minwm.geometry.camera import se3_exp
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History, teacher_forcing
from minwm.models.prope import Cameras, transform
from minwm.models.rope import rotation
from minwm.models.wan import SelfAttention, Step, WanConfig

pytestmark = pytest.mark.unit

NewCameras = Callable[[int, int], Cameras]


def rigid(seed: int, count: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    twists = torch.randn(count, 6, generator=random, dtype=torch.float64).numpy()
    return torch.stack([torch.from_numpy(se3_exp(twist)) for twist in twists])


@given(seed=st.integers(0, 10_000))
def test_projection_is_the_lifted_intrinsics_times_the_viewmat_and_its_inverse(seed: int) -> None:
    torch.manual_seed(seed)
    viewmats, intrinsics = rigid(seed, 6).reshape(2, 3, 4, 4), torch.rand(2, 4) + 0.3
    got = Cameras.track(viewmats.float(), intrinsics).projection
    lifted = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1, 1)
    lifted[:, 0, 0, 0], lifted[:, 0, 1, 1] = intrinsics[:, 0].double(), intrinsics[:, 1].double()
    torch.testing.assert_close(got.matrix.double(), lifted @ viewmats, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.inverse.double(), torch.linalg.inv(lifted @ viewmats), rtol=0, atol=1e-5)


def test_transform_maps_every_group_of_four_channels_by_its_frame_s_matrix() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 4, 4)  # 2 frames of 3 tokens, 3 heads, 2 groups
    got = transform(x, matrix)
    for b in range(2):
        for token in range(6):
            for head in range(3):
                for group in (slice(0, 4), slice(4, 8)):
                    expected = matrix[b, token // 3] @ x[b, token, head, group]
                    torch.testing.assert_close(got[b, token, head, group], expected)


@given(seed=st.integers(0, 100))
def test_projections_and_motions_are_float32_under_autocast_and_fit_for_training_whoever_asks_first(seed: int) -> None:
    viewmats, intrinsics = rigid(seed, 3).float()[None], torch.rand(1, 4) + 0.3
    viewmats[..., :3, 3] *= 300
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cameras = Cameras.track(viewmats, intrinsics)
        p = cameras.projection
    exact = Cameras.track(viewmats.double(), intrinsics.double())
    torch.testing.assert_close(p.matrix @ p.inverse, torch.eye(4).expand(1, 3, 4, 4), rtol=0, atol=1e-3)
    torch.testing.assert_close(cameras.motions.double(), exact.motions, rtol=1e-5, atol=1e-2)
    weight = torch.ones((), requires_grad=True)
    (p.matrix * weight).sum().backward()
    assert weight.grad is not None


def test_transform_computes_in_float32_even_under_autocast() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(1, 2, 1, 4), 100 + torch.randn(1, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = transform(x, matrix)
    assert torch.equal(under_autocast, transform(x, matrix))


@torch.no_grad()
def forward(backbone: Backbone, cameras: Cameras) -> Tensor:
    """A teacher-forced pass over fixed random frames, so that masks, both halves and all layers take part."""
    torch.manual_seed(5)
    model, frames = backbone.model, 6
    prompt = model.prompt(torch.randint(0, 257, (2, 12)))
    latents, timesteps = torch.randn(2, 2 * frames, 4, 4, 6), 1000 * torch.rand(2, 2 * frames)
    context = teacher_forcing(frames, History(chunk=2, window=4))
    out: Tensor = model(latents, timesteps, prompt, context, Conditions(cameras.repeat_frames(2)))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_one_world_transform_of_all_cameras_changes_nothing(
    tiny_backbone: Backbone, new_cameras: NewCameras, seed: int
) -> None:
    cameras = new_cameras(2, 6)
    world = torch.linalg.inv(rigid(seed, 1)[0])
    moved = Cameras.track((cameras.viewmats.double() @ world).float(), cameras.intrinsics)
    torch.testing.assert_close(forward(tiny_backbone, moved), forward(tiny_backbone, cameras), rtol=0, atol=1e-4)


def test_relative_motion_and_focal_lengths_matter(tiny_backbone: Backbone, new_cameras: NewCameras) -> None:
    cameras = new_cameras(2, 6)
    plain = forward(tiny_backbone, cameras)
    viewmats = cameras.viewmats.clone()
    viewmats[:, 3, 0, 3] += 0.5
    assert not torch.allclose(forward(tiny_backbone, Cameras.track(viewmats, cameras.intrinsics)), plain, atol=1e-2)
    for focal in (0, 1):
        intrinsics = cameras.intrinsics.clone()
        intrinsics[:, focal] *= 1.5
        assert not torch.allclose(forward(tiny_backbone, Cameras.track(cameras.viewmats, intrinsics)), plain, atol=1e-2)


def test_the_principal_point_is_ignored(tiny_backbone: Backbone, new_cameras: NewCameras) -> None:
    cameras = new_cameras(2, 6)
    elsewhere = cameras.intrinsics.clone()
    elsewhere[:, 2:] = torch.tensor([-3.0, 17.0])
    moved = Cameras.track(cameras.viewmats, elsewhere)
    assert torch.equal(forward(tiny_backbone, moved), forward(tiny_backbone, cameras))


def test_one_call_over_twice_the_heads_is_the_two_attentions_of_the_formula(new_cameras: NewCameras) -> None:
    """o(A(q, k, v; RoPE)) + prope_o(P · A(Pᵀq, P⁻¹k, P⁻¹v)), spelled out in float64."""
    torch.manual_seed(0)
    config = WanConfig(dim=32, layers=1, heads=2, ffn_dim=8, conditions=("camera_prope",))
    layer = SelfAttention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, cameras = torch.randn(2, 3 * 2, 32), new_cameras(2, 3)
    angles = rotation(range(3), 1, 2, (8, 4, 4), torch.device("cpu"))
    with torch.no_grad():
        got = layer(x, 0, Step(Full(3), angles, cameras.projection))

    layer.double()
    x = x.double()

    def rms(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + config.eps).sqrt() * weight

    q = rms(layer.q(x), layer.norm_q.weight).unflatten(-1, (2, 16))
    k = rms(layer.k(x), layer.norm_k.weight).unflatten(-1, (2, 16))
    v = layer.v(x).unflatten(-1, (2, 16))

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(16)
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)

    phases = torch.view_as_complex(angles.double())

    def roped(y: Tensor) -> Tensor:
        turned = torch.view_as_complex(y.unflatten(-1, (8, 2)).contiguous()) * phases[:, None]
        return torch.view_as_real(turned).flatten(-2)

    lifted = torch.diag_embed(torch.cat([cameras.intrinsics[:, :2], torch.ones(2, 2)], -1)).double()
    matrices = (lifted[:, None] @ cameras.viewmats.double()).repeat_interleave(2, 1)  # (b, token, 4, 4)

    def mapped(y: Tensor, by: Tensor) -> Tensor:
        return torch.einsum("bnij,bnhgj->bnhgi", by, y.unflatten(-1, (4, 4))).flatten(-2)

    inverse = torch.linalg.inv(matrices)
    by_position = softmax_attention(roped(q), roped(k), v).flatten(2)
    by_camera = softmax_attention(mapped(q, matrices.mT), mapped(k, inverse), mapped(v, inverse))
    expected = layer.o(by_position) + layer.prope_o(mapped(by_camera, matrices).flatten(2))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 5))
def test_motions_are_poses_relative_to_the_frame_before_in_any_split_of_the_stream(seed: int, cut: int) -> None:
    poses = rigid(seed, 6)  # camera to world
    viewmats, intrinsics = torch.linalg.inv(poses).float()[None], torch.rand(1, 4) + 0.3
    whole = Cameras.track(viewmats, intrinsics)
    later = Cameras.track(viewmats[:, cut:], intrinsics, viewmats[:, cut - 1])
    for frame in range(1, 6):
        expected = torch.linalg.inv(poses[frame - 1]) @ poses[frame]
        torch.testing.assert_close(whole.motions[0, frame].double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.motions[0, 0], torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(later.motions, whole.motions[:, cut:])
    assert torch.equal(whole.frames(cut, 6).motions, later.motions)


@pytest.mark.parametrize(
    ("viewmats", "intrinsics", "complaint"),
    [
        (
            torch.eye(4).expand(2, 4, 4),
            torch.ones(2, 4),
            r"viewmats have shape \(2, 4, 4\), expected \(batch, frames, 4, 4\)",
        ),
        (torch.eye(4).expand(2, 3, 4, 4), torch.ones(4), r"intrinsics have shape \(4,\), expected \(2, 4\)"),
        (
            torch.eye(4).expand(2, 3, 4, 4),
            torch.tensor([[1.0] * 4, [0.5, 0, 0.5, 0.5]]),
            r"intrinsics\[1\]: .* fx, fy > 0",
        ),
        (torch.eye(4).expand(2, 3, 4, 4), torch.full((2, 4), torch.nan), r"intrinsics\[0\]: .* finite"),
        (
            torch.stack([torch.eye(4), torch.eye(4) / 0]).expand(1, 2, 4, 4),
            torch.ones(1, 4),
            r"viewmats\[0, 1\]: is not finite",
        ),
    ],
)
def test_cameras_that_make_no_sense_are_refused(viewmats: Tensor, intrinsics: Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Cameras.track(viewmats, intrinsics)
