"""Streams through Wan's autoencoder against Diffusers' own pass over the whole clip, in float64 with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minwm.errors import CheckpointError, DataError
from minwm.models.layout import LatentLayout
from minwm.models.published_vaes import state_bytes
from minwm.models.wan_vae import WanVAE, load_wan_vae

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LATENTS = 4
FRAMES = 1 + 4 * (LATENTS - 1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def new_vae(**changes: Any) -> Any:
    """Wan's own levels, channels and statistics; narrow, one block per level, every weight moved off its start."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**{"base_dim": 4, "num_res_blocks": 1, **changes})
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


@pytest.fixture(scope="module")
def vae() -> Any:
    return new_vae().double()


@pytest.fixture(scope="module")
def model(vae: Any) -> WanVAE:
    return WanVAE(vae)


@pytest.fixture(scope="module")
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, FRAMES, 3, 16, 24, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole_latents(vae: Any, video: Tensor) -> Tensor:
    """Diffusers' mode, normalised with its configuration's statistics."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    mode = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return (mode.transpose(1, 2) - mean) / std


@pytest.fixture(scope="module")
def latents() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, LATENTS, 16, 2, 3, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole_frames(vae: Any, latents: Tensor) -> Tensor:
    """Diffusers clamps: most of the picture has to lie inside for the comparison to mean anything."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    frames = (vae.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2) + 1) / 2
    assert ((frames > 0) & (frames < 1)).double().mean() > 0.9
    return frames


def pieces(data: st.DataObject, length: int) -> list[slice]:
    """Any way of cutting `length` frames into pieces, single frames and empty pieces among them."""
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6), label="cuts"))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=20)
@given(data=st.data())
def test_encoding_in_any_split_equals_diffusers_on_the_whole_clip(
    model: WanVAE, video: Tensor, whole_latents: Tensor, data: st.DataObject
) -> None:
    state, parts, seen = None, [], 0
    for piece in pieces(data, FRAMES):
        encoded, state = model.encode(video[:, piece], state)
        seen += encoded.shape[1]
        parts.append(encoded)
        assert seen == (piece.stop + 3) // 4, "a latent frame is out when its last frame is in"
    torch.testing.assert_close(torch.cat(parts, 1), whole_latents, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(data=st.data())
def test_decoding_in_any_split_equals_diffusers_on_the_whole_clip(
    model: WanVAE, latents: Tensor, whole_frames: Tensor, data: st.DataObject
) -> None:
    state, parts, seen = None, [], 0
    for piece in pieces(data, LATENTS):
        decoded, state = model.decode(latents[:, piece], state)
        seen += decoded.shape[1]
        parts.append(decoded)
        assert seen == model.layout.rgb_frames(piece.stop)
    torch.testing.assert_close(torch.cat(parts, 1).clamp(0, 1), whole_frames, rtol=0, atol=1e-9)


def test_streams_interleave_and_fork_on_one_module(model: WanVAE, video: Tensor, latents: Tensor) -> None:
    def steps(video: Tensor, latents: Tensor) -> list[Tensor]:
        """A stream of its own from start to end, in two pieces each way."""
        first, encoding = model.encode(video[:, :7])
        second, _ = model.encode(video[:, 7:], encoding)
        third, decoding = model.decode(latents[:, :2])
        fourth, _ = model.decode(latents[:, 2:], decoding)
        return [first, second, third, fourth]

    other_video, other_latents = video.flip(1, 3), latents.flip(1, 3)
    alone, other_alone = steps(video, latents), steps(other_video, other_latents)
    first, encoding = model.encode(video[:, :7])
    other_first, other_encoding = model.encode(other_video[:, :7])
    third, decoding = model.decode(latents[:, :2])
    other_third, other_decoding = model.decode(other_latents[:, :2])
    for _ in range(2):  # the second time from the same states: a fork
        together = [first, model.encode(video[:, 7:], encoding)[0], third, model.decode(latents[:, 2:], decoding)[0]]
        others = [other_first, model.encode(other_video[:, 7:], other_encoding)[0]]
        others += [other_third, model.decode(other_latents[:, 2:], other_decoding)[0]]
        assert all(map(torch.equal, together, alone))
        assert all(map(torch.equal, others, other_alone))


def test_a_state_keeps_nothing_of_the_piece_that_it_came_from(model: WanVAE, video: Tensor, latents: Tensor) -> None:
    _, (waiting, encoding) = model.encode(video[:, :7])
    _, decoding = model.decode(latents)
    assert torch.equal(waiting, video[:, 5:7])
    tensors = [part for part in (waiting, *encoding, *decoding) if isinstance(part, Tensor)]
    assert sum(part.untyped_storage().nbytes() for part in tensors) == state_bytes((waiting, encoding, decoding))


def test_a_state_stops_growing_after_the_third_latent_frame(model: WanVAE, video: Tensor, latents: Tensor) -> None:
    encoding = decoding = None
    sizes = []
    for i in range(LATENTS):
        _, encoding = model.encode(video[:, 4 * i - 3 if i else 0 : 4 * i + 1], encoding)
        _, decoding = model.decode(latents[:, i : i + 1], decoding)
        sizes.append((state_bytes(encoding), state_bytes(decoding)))
    assert sizes[0] < sizes[1] <= sizes[2] == sizes[3]


def test_a_bfloat16_network_takes_and_gives_float32(vae: Any, video: Tensor, whole_latents: Tensor) -> None:
    model = WanVAE(new_vae().bfloat16())
    encoded, _ = model.encode(video.float())
    decoded, _ = model.decode(encoded)
    assert encoded.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(encoded, whole_latents.float(), rtol=0, atol=0.1)


def test_the_layout_is_that_of_the_published_model(model: WanVAE) -> None:
    assert model.layout == LatentLayout(channels=16, pixels=8, leading=True)


@pytest.mark.parametrize("shape", [(1, 1, 3, 12, 24), (1, 1, 3, 16, 20), (1, 1, 4, 16, 24), (1, 3, 16, 24)])
def test_frames_that_do_not_fit_are_refused(model: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        DataError, match=r"frames: shape \(1, .*\), expected \(b, t, 3, y, x\) with y and x multiples of 8"
    ):
        model.encode(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 1, 32, 2, 3), (1, 16, 2, 3)])
def test_latents_that_do_not_fit_are_refused(model: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"latents: shape \(1, .*\), expected \(b, f, 16, y, x\)"):
        model.decode(torch.rand(shape))


def test_wan_2_2s_autoencoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"is_residual=True, patch_size=2: expected Wan 2\.1's"):
        WanVAE(new_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12))


class TestLoading:
    @pytest.fixture
    def folder(self, vae: Any, tmp_path: Path) -> Path:
        vae.save_pretrained(tmp_path)
        return tmp_path

    def test_a_folder_of_diffusers_loads_in_the_dtype_asked_for(
        self, folder: Path, model: WanVAE, latents: Tensor
    ) -> None:
        loaded = load_wan_vae(folder, torch.float64)
        assert torch.equal(loaded.decode(latents)[0], model.decode(latents)[0])
        assert load_wan_vae(folder, torch.bfloat16).vae.dtype == torch.bfloat16

    def test_an_absent_file_is_named_with_the_way_to_get_it(self, folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        with pytest.raises(
            CheckpointError, match="safetensors of an AutoencoderKLWan; get them with `hf download Wan-AI"
        ):
            load_wan_vae(folder)

    def test_another_models_folder_is_refused(self, folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(config.read_text().replace("AutoencoderKLWan", "AutoencoderKLMagvit"))
        with pytest.raises(CheckpointError, match="holds a 'AutoencoderKLMagvit', expected a 'AutoencoderKLWan'"):
            load_wan_vae(folder)

    def test_every_key_that_does_not_fit_is_named(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights["decoder.extra"] = weights.pop("encoder.conv_in.bias")
        weights["quant_conv.bias"] = torch.zeros(3)
        save_file(weights, folder / WEIGHTS)
        problems = "missing encoder.conv_in.bias; quant_conv.bias has shape .*; unexpected decoder.extra"
        with pytest.raises(CheckpointError, match=problems):
            load_wan_vae(folder)

    def test_a_damaged_file_is_refused(self, folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(b"not safetensors")
        with pytest.raises(CheckpointError, match="damaged"):
            load_wan_vae(folder)
