"""The streaming autoencoder, and the decoder by itself, in any split, against a frame-by-frame reference."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import CheckpointError, ConfigError, DataError
from minwm.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    DecoderConfig,
    State,
    TinyDecoder,
)
from minwm.models.checkpoints import load_autoencoder, load_decoder, save_autoencoder, save_decoder
from minwm.models.layout import LatentLayout, VideoAutoencoder

pytestmark = pytest.mark.unit

FRAMES = 20
CONFIG = AutoencoderConfig(latent_channels=4, widths=(4, 6, 8), encoder_blocks=(1, 2, 1), decoder_blocks=(1, 2, 2))
SHIPPED = Path(__file__).parents[3] / "models/wan-doom/autoencoder"
LAYOUTS = [LatentLayout(channels=5, pixels=pixels, leading=leading) for pixels in (8, 16) for leading in (True, False)]


def named(layout: LatentLayout) -> str:
    return f"{layout.pixels}-pixels-{'leading' if layout.leading else 'even'}"


class Reference:
    """The autoencoder's description, run one frame at a time in float64; every block remembers one frame."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.before: dict[str, Tensor] = {}

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride=stride, padding=padding)

    def block(self, name: str, x: Tensor) -> Tensor:
        past = self.before.get(name, torch.zeros_like(x))
        self.before[name] = x
        hidden = self.conv(f"{name}.conv1", F.relu(torch.cat([x, past], 1)))
        return x + self.conv(f"{name}.conv2", F.relu(hidden))

    def stage(self, name: str, x: Tensor) -> Tensor:
        number = 0
        while f"{name}.{number}.conv1.weight" in self.weights:
            x = self.block(f"{name}.{number}", x)
            number += 1
        return x

    def encode(self, frames: Tensor) -> Tensor:
        """(b, t, 3, y, x) to (b, t // 4, c, y/8, x/8)."""
        latents, halves, quarters = [], [], []
        for frame in frames.unbind(1):
            b, _, y, x = frame.shape
            cells = (2 * frame - 1).reshape(b, 3, y // 2, 2, x // 2, 2).permute(0, 1, 3, 5, 2, 4)
            halves.append(self.stage("encoder.fine", self.conv("encoder.stem", cells.reshape(b, 12, y // 2, x // 2))))
            if len(halves) < 2:
                continue
            merged = self.conv("encoder.merge1.conv", torch.cat(halves, 1))
            halves = []
            quarters.append(self.stage("encoder.middle", self.conv("encoder.down1", merged, stride=2)))
            if len(quarters) < 2:
                continue
            merged = self.conv("encoder.merge2.conv", torch.cat(quarters, 1))
            quarters = []
            coarse = self.stage("encoder.coarse", self.conv("encoder.down2", merged, stride=2))
            latents.append(self.conv("encoder.head", F.relu(coarse)))
        mean, std = (self.weights[f"latent_{name}"][:, None, None] for name in ("mean", "std"))
        return (torch.stack(latents, 1) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """(b, f, c, y, x) to (b, 4f, 3, 8y, 8x)."""
        mean, std = (self.weights[f"latent_{name}"][:, None, None] for name in ("mean", "std"))
        return self.pictures(latents * std + mean, cell=2)

    def pictures(self, latents: Tensor, cell: int) -> Tensor:
        """(b, f, c, y, x), as the decoder takes them, to (b, 4f, 3, 4·cell·y, 4·cell·x)."""
        frames = []
        for z in latents.unbind(1):
            coarse = self.conv("decoder.stem", 3 * torch.tanh(z / 3))
            coarse = self.doubled(self.conv("decoder.up2", self.stage("decoder.coarse", coarse)))
            for quarter in self.conv("decoder.split2.conv", coarse).chunk(2, 1):
                fine = self.doubled(self.conv("decoder.up1", self.stage("decoder.middle", quarter)))
                for half in self.conv("decoder.split1.conv", fine).chunk(2, 1):
                    cells = self.conv("decoder.head", F.relu(self.stage("decoder.fine", half)))
                    b, _, y, x = cells.shape
                    frame = cells.reshape(b, 3, cell, cell, y, x).permute(0, 1, 4, 2, 5, 3)
                    frames.append((frame.reshape(b, 3, cell * y, cell * x) + 1) / 2)
        return torch.stack(frames, 1)

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(CONFIG).double().requires_grad_(False)
    model.calibrate(torch.randn(4, dtype=torch.float64), 0.5 + torch.rand(4, dtype=torch.float64))
    return model


@pytest.fixture(scope="module")
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, FRAMES, 3, 16, 24, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole_latents(model: Autoencoder, video: Tensor) -> Tensor:
    return Reference(model.state_dict()).encode(video)


@pytest.fixture(scope="module")
def whole_frames(model: Autoencoder, whole_latents: Tensor) -> Tensor:
    return Reference(model.state_dict()).decode(whole_latents)


def pieces(data: st.DataObject, length: int) -> list[slice]:
    """Any way of cutting `length` frames into pieces, single frames among them."""
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=8), label="cuts"))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=40)
@given(data=st.data())
def test_encoding_in_any_split_equals_the_reference_on_the_whole_clip(
    model: Autoencoder, video: Tensor, whole_latents: Tensor, data: st.DataObject
) -> None:
    state: State | None = None
    latents, seen = [], 0
    for piece in pieces(data, FRAMES):
        encoded, state = model.encode(video[:, piece], state)
        seen += piece.stop - piece.start
        latents.append(encoded)
        assert sum(part.shape[1] for part in latents) == seen // 4, "a latent frame is out when its fourth frame is in"
    torch.testing.assert_close(torch.cat(latents, 1), whole_latents, rtol=0, atol=1e-10)


@settings(max_examples=40)
@given(data=st.data())
def test_decoding_in_any_split_equals_the_reference_on_the_whole_clip(
    model: Autoencoder, whole_latents: Tensor, whole_frames: Tensor, data: st.DataObject
) -> None:
    state: State | None = None
    frames = []
    for piece in pieces(data, FRAMES // 4):
        decoded, state = model.decode(whole_latents[:, piece], state)
        assert decoded.shape[1] == 4 * (piece.stop - piece.start)
        frames.append(decoded)
    torch.testing.assert_close(torch.cat(frames, 1), whole_frames, rtol=0, atol=1e-10)


def test_a_state_can_be_used_again_to_fork_a_stream(model: Autoencoder, whole_latents: Tensor) -> None:
    _, state = model.decode(whole_latents[:, :2])
    once, _ = model.decode(whole_latents[:, 2:], state)
    model.decode(torch.randn_like(whole_latents), state)
    again, _ = model.decode(whole_latents[:, 2:], state)
    assert torch.equal(once, again)


def test_the_past_matters_and_the_future_does_not(model: Autoencoder, video: Tensor, whole_latents: Tensor) -> None:
    late = video.clone()
    late[:, 8:] = 0
    encoded, _ = model.encode(late)
    torch.testing.assert_close(encoded[:, :2], whole_latents[:, :2], rtol=0, atol=1e-10)
    fresh, _ = model.encode(video[:, 8:])
    assert not torch.allclose(fresh[:, 0], whole_latents[:, 2], atol=1e-3)


def test_calibrated_latents_have_zero_mean_and_unit_deviation_and_decode_as_before(video: Tensor) -> None:
    torch.manual_seed(2)
    model = Autoencoder(CONFIG).double().requires_grad_(False)
    for _ in range(2):  # measuring again, in normalised latents, changes nothing
        before, _ = model.encode(video)
        frames, _ = model.decode(before)
        model.calibrate(before.mean((0, 1, 3, 4)), before.std((0, 1, 3, 4)))
        after, _ = model.encode(video)
        torch.testing.assert_close(after.mean((0, 1, 3, 4)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(after.std((0, 1, 3, 4)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(model.decode(after)[0], frames, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(12, 24), (16, 20)])
def test_a_picture_whose_sides_are_no_multiples_of_8_is_refused(model: Autoencoder, height: int, width: int) -> None:
    with pytest.raises(DataError, match=f"frames are {height}x{width}, expected sides in multiples of 8"):
        model.encode(torch.rand(1, 4, 3, height, width, dtype=torch.float64))


def test_it_is_a_video_autoencoder_whose_every_latent_frame_stands_for_four(model: Autoencoder) -> None:
    autoencoder: VideoAutoencoder = model
    assert autoencoder.layout == LatentLayout(channels=4, pixels=8, leading=False)


def test_the_shipped_weights_are_those_of_the_description() -> None:
    model = load_autoencoder(SHIPPED, torch.float64)
    torch.manual_seed(3)
    latents = torch.randn(1, 3, 16, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        frames, _ = model.decode(latents)
        encoded, _ = model.encode(frames)
    reference = Reference(model.state_dict())
    torch.testing.assert_close(frames, reference.decode(latents), rtol=0, atol=1e-10)
    torch.testing.assert_close(encoded, reference.encode(frames), rtol=0, atol=1e-10)


def new_decoder(layout: LatentLayout) -> TinyDecoder:
    torch.manual_seed(4)
    decoder = TinyDecoder(DecoderConfig(layout=layout, widths=(4, 6, 8), blocks=(1, 2, 2)))
    return decoder.double().requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_a_decoder_by_itself_in_any_split_equals_the_reference_on_the_whole_stream(layout: LatentLayout) -> None:
    decoder, length = new_decoder(layout), 6
    reference = Reference({f"decoder.{name}": value for name, value in decoder.state_dict().items()})
    latents = 2 * torch.randn(2, length, 5, 2, 3, dtype=torch.float64)
    whole = reference.pictures(latents, cell=layout.pixels // 4)
    if layout.leading:
        whole = whole[:, 3:]  # the first latent frame stands for one frame: the last of its four

    @settings(max_examples=25)
    @given(data=st.data())
    def in_any_split(data: st.DataObject) -> None:
        state: State | None = None
        frames, seen = [], 0
        for piece in pieces(data, length):
            decoded, state = decoder.decode(latents[:, piece], state)
            frames.append(decoded)
            seen += piece.stop - piece.start
            assert sum(part.shape[1] for part in frames) == layout.rgb_frames(seen)
        torch.testing.assert_close(torch.cat(frames, 1), whole, rtol=0, atol=1e-10)

    in_any_split()


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_decoding_no_latents_gives_no_frames_and_leaves_the_stream_where_it_was(layout: LatentLayout) -> None:
    decoder = new_decoder(layout)
    latents = torch.randn(1, 3, 5, 2, 3, dtype=torch.float64)
    whole, _ = decoder.decode(latents)
    state: State | None = None
    frames = []
    for piece in (slice(0, 0), slice(0, 2), slice(2, 2), slice(2, 3)):
        decoded, state = decoder.decode(latents[:, piece], state)
        assert decoded.shape[2:] == (3, 2 * layout.pixels, 3 * layout.pixels)
        frames.append(decoded)
    torch.testing.assert_close(torch.cat(frames, 1), whole, rtol=0, atol=1e-10)


def test_a_decoder_s_state_can_be_used_again_to_fork_a_stream() -> None:
    decoder = new_decoder(LAYOUTS[0])
    latents = torch.randn(1, 4, 5, 2, 3, dtype=torch.float64)
    _, state = decoder.decode(latents[:, :1])
    once, _ = decoder.decode(latents[:, 1:], state)
    decoder.decode(torch.randn_like(latents), state)
    again, _ = decoder.decode(latents[:, 1:], state)
    assert torch.equal(once, again)


def test_latents_of_another_autoencoder_are_refused(model: Autoencoder) -> None:
    with pytest.raises(DataError, match="latents have 16 channels, expected 5"):
        new_decoder(LAYOUTS[0]).decode(torch.randn(1, 2, 16, 2, 3, dtype=torch.float64))
    with pytest.raises(DataError, match="latents have 1 channels, expected 4"):
        model.decode(torch.randn(1, 2, 1, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layout": LatentLayout(channels=5, pixels=4, leading=True)}, "layout.pixels=4: expected 8 or 16"),
        ({"layout": LatentLayout(channels=0, pixels=8, leading=True)}, "layout.channels=0, .* positive numbers"),
        ({"blocks": (1, 0, 2)}, r"blocks=\(1, 0, 2\): expected positive numbers"),
    ],
)
def test_a_decoder_that_cannot_be_built_is_named(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        DecoderConfig(**{"layout": LAYOUTS[0], **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_a_decoder_that_was_saved_is_loaded_as_it_was(tmp_path: Path, layout: LatentLayout) -> None:
    decoder = new_decoder(layout).bfloat16()
    save_decoder(tmp_path / "decoder", decoder, {"stage": "decoder"})
    loaded = load_decoder(tmp_path / "decoder", torch.bfloat16)
    assert loaded.config == decoder.config
    assert not loaded.training
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert json.loads((tmp_path / "decoder/config.json").read_text())["about"] == {"stage": "decoder"}


def test_an_autoencoder_s_folder_is_not_a_decoder_s(tmp_path: Path, model: Autoencoder) -> None:
    save_autoencoder(tmp_path / "weights", model)
    with pytest.raises(CheckpointError, match="holds a 'autoencoder', expected a 'decoder'"):
        load_decoder(tmp_path / "weights")
