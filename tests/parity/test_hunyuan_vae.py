"""Streams through HunyuanVideo-1.5's autoencoder against Diffusers' whole clip, in float64 with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import CheckpointError, ConfigError, DataError
from minwm.models.hunyuan_vae import HunyuanVAE, load_hunyuan_vae
from minwm.models.layout import LatentLayout
from minwm.models.published_vaes import state_bytes

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LATENTS, CHANNELS, WINDOW = 4, 4, 2
FRAMES = 1 + 4 * (LATENTS - 1)


def new_vae() -> Any:
    """The published levels, narrow, one block per level; every weight moved off its start."""
    from diffusers import AutoencoderKLHunyuanVideo15

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=CHANNELS, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1
        )
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    vae.enable_slicing()  # its mask is shaped for one clip at a time
    return vae


@pytest.fixture(scope="module")
def vae() -> Any:
    return new_vae().double()


@pytest.fixture(scope="module")
def model(vae: Any) -> HunyuanVAE:
    return HunyuanVAE(vae)


@pytest.fixture(scope="module")
def windowed(vae: Any) -> HunyuanVAE:
    return HunyuanVAE(vae, exact_latents=WINDOW)


@pytest.fixture(scope="module")
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, FRAMES, 3, 16, 32, dtype=torch.float64)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, LATENTS, CHANNELS, 1, 2, dtype=torch.float64)


def encode_whole(vae: Any, video: Tensor) -> Tensor:
    mode: Tensor = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return mode.transpose(1, 2) * vae.config.scaling_factor


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    frames: Tensor = vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample
    return (frames.transpose(1, 2) + 1) / 2


@pytest.fixture(scope="module")
def whole_latents(vae: Any, video: Tensor) -> Tensor:
    return encode_whole(vae, video)


@pytest.fixture(scope="module")
def whole_frames(vae: Any, latents: Tensor) -> Tensor:
    return decode_whole(vae, latents)


def pieces(data: st.DataObject, length: int) -> list[slice]:
    """Any way of cutting `length` frames into pieces, single frames and empty pieces among them."""
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6), label="cuts"))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=8)
@given(data=st.data())
def test_encoding_in_any_split_equals_diffusers_on_the_whole_clip(
    model: HunyuanVAE, video: Tensor, whole_latents: Tensor, data: st.DataObject
) -> None:
    state, parts, seen = None, [], 0
    for piece in pieces(data, FRAMES):
        encoded, state = model.encode(video[:, piece], state)
        seen += encoded.shape[1]
        parts.append(encoded)
        assert seen == (piece.stop + 3) // 4, "a latent frame is out when its last frame is in"
    torch.testing.assert_close(torch.cat(parts, 1), whole_latents, rtol=0, atol=1e-6)


@settings(max_examples=8)
@given(data=st.data())
def test_decoding_in_any_split_equals_diffusers_on_the_whole_clip(
    model: HunyuanVAE, latents: Tensor, whole_frames: Tensor, data: st.DataObject
) -> None:
    state, parts, seen = None, [], 0
    for piece in pieces(data, LATENTS):
        decoded, state = model.decode(latents[:, piece], state)
        seen += decoded.shape[1]
        parts.append(decoded)
        assert seen == model.layout.rgb_frames(piece.stop)
    torch.testing.assert_close(torch.cat(parts, 1), whole_frames, rtol=0, atol=1e-6)


def test_streams_interleave_and_fork_on_one_module(model: HunyuanVAE, video: Tensor, latents: Tensor) -> None:
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


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square error over the standard deviation of what it should be."""
    return ((ours - theirs).square().mean() / theirs.var()).sqrt().item()


def test_beyond_exact_latents_a_stream_is_near_the_whole_clip_but_not_equal(
    windowed: HunyuanVAE, video: Tensor, latents: Tensor, whole_latents: Tensor, whole_frames: Tensor
) -> None:
    """By 5.0 % (latents) and 3.6 % (frames) of their deviation, with these weights and a reach of 2 out of 4 frames."""
    encoded, decoded = windowed.encode(video)[0], windowed.decode(latents)[0]
    exact = windowed.layout.rgb_frames(WINDOW)
    torch.testing.assert_close(encoded[:, :WINDOW], whole_latents[:, :WINDOW], rtol=0, atol=1e-6)
    torch.testing.assert_close(decoded[:, :exact], whole_frames[:, :exact], rtol=0, atol=1e-6)
    assert 0.01 < relative_error(encoded[:, WINDOW:], whole_latents[:, WINDOW:]) < 0.1
    assert 0.01 < relative_error(decoded[:, exact:], whole_frames[:, exact:]) < 0.1


def test_beyond_exact_latents_the_attention_sees_just_the_last_ones(
    vae: Any, windowed: HunyuanVAE, video: Tensor, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole clip in Diffusers, with a mask that hides what is further back."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock

    def band(n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int) -> Tensor:
        frame = torch.arange(n_frame, device=device).repeat_interleave(n_hw)
        ago = frame[:, None] - frame
        hidden = (ago < 0) | (ago >= WINDOW)
        return torch.zeros(ago.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)[None]

    monkeypatch.setattr(HunyuanVideo15AttnBlock, "prepare_causal_attention_mask", staticmethod(band))
    torch.testing.assert_close(windowed.encode(video)[0], encode_whole(vae, video), rtol=0, atol=1e-6)
    torch.testing.assert_close(windowed.decode(latents)[0], decode_whole(vae, latents), rtol=0, atol=1e-6)


def test_a_state_keeps_nothing_of_the_piece_that_it_came_from(
    model: HunyuanVAE, video: Tensor, latents: Tensor
) -> None:
    _, (waiting, encoding) = model.encode(video[:, :7])
    _, decoding = model.decode(latents)
    assert torch.equal(waiting, video[:, 5:7])
    tensors = [part for part in (waiting, *encoding, *decoding) if isinstance(part, Tensor)]
    assert sum(part.untyped_storage().nbytes() for part in tensors) == state_bytes((waiting, encoding, decoding))


def test_a_state_stops_growing_when_the_window_is_full(windowed: HunyuanVAE, video: Tensor, latents: Tensor) -> None:
    encoding = decoding = None
    sizes = []
    for i in range(LATENTS):
        _, encoding = windowed.encode(video[:, 4 * i - 3 if i else 0 : 4 * i + 1], encoding)
        _, decoding = windowed.decode(latents[:, i : i + 1], decoding)
        sizes.append((state_bytes(encoding), state_bytes(decoding)))
    assert len(set(sizes[WINDOW - 1 :])) == 1


def test_a_bfloat16_network_takes_and_gives_float32(video: Tensor, whole_latents: Tensor) -> None:
    model = HunyuanVAE(new_vae().bfloat16())
    encoded, _ = model.encode(video.float())
    decoded, _ = model.decode(encoded)
    assert encoded.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(encoded, whole_latents.float(), rtol=0.05, atol=0.1)


def test_the_layout_is_that_of_the_published_model(model: HunyuanVAE) -> None:
    assert model.layout == LatentLayout(channels=CHANNELS, pixels=16, leading=True)


def test_an_attention_that_sees_nothing_is_refused(vae: Any) -> None:
    with pytest.raises(ConfigError, match="exact_latents=0: expected at least 1"):
        HunyuanVAE(vae, exact_latents=0)


def test_bad_input_is_refused(model: HunyuanVAE) -> None:
    with pytest.raises(DataError, match=r"frames: shape \(1, 1, 3, 24, 48\), expected .* multiples of 16"):
        model.encode(torch.rand(1, 1, 3, 24, 48))
    with pytest.raises(DataError, match=r"latents: shape \(1, 1, 8, 2, 3\), expected \(b, f, 4, y, x\)"):
        model.decode(torch.rand(1, 1, 8, 2, 3))


def test_a_folder_of_diffusers_loads(vae: Any, windowed: HunyuanVAE, latents: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="get them with `hf download hunyuanvideo-community"):
        load_hunyuan_vae(tmp_path)
    vae.save_pretrained(tmp_path)
    loaded = load_hunyuan_vae(tmp_path, torch.float64, exact_latents=WINDOW)
    assert torch.equal(loaded.decode(latents)[0], windowed.decode(latents)[0])
