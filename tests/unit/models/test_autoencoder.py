"""The streaming autoencoder against a frame-by-frame reference, in any split of the frames."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import DataError
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig, State

pytestmark = pytest.mark.unit

FRAMES = 20
CONFIG = AutoencoderConfig(latent_channels=4, widths=(4, 6, 8), encoder_blocks=(1, 2, 1), decoder_blocks=(1, 2, 2))


class Reference:
    """The autoencoder's description, run one frame at a time in float64; every block remembers one frame."""

    def __init__(self, model: Autoencoder) -> None:
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
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
        frames = []
        for z in latents.unbind(1):
            coarse = self.conv("decoder.stem", 3 * torch.tanh((z * std + mean) / 3))
            coarse = self.doubled(self.conv("decoder.up2", self.stage("decoder.coarse", coarse)))
            for quarter in self.conv("decoder.split2.conv", coarse).chunk(2, 1):
                fine = self.doubled(self.conv("decoder.up1", self.stage("decoder.middle", quarter)))
                for half in self.conv("decoder.split1.conv", fine).chunk(2, 1):
                    cells = self.conv("decoder.head", F.relu(self.stage("decoder.fine", half)))
                    b, _, y, x = cells.shape
                    frame = cells.reshape(b, 3, 2, 2, y, x).permute(0, 1, 4, 2, 5, 3).reshape(b, 3, 2 * y, 2 * x)
                    frames.append((frame + 1) / 2)
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
    return Reference(model).encode(video)


@pytest.fixture(scope="module")
def whole_frames(model: Autoencoder, whole_latents: Tensor) -> Tensor:
    return Reference(model).decode(whole_latents)


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
