"""What the transformer promises its callers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone
from minwm.models.context import Beside, Full, teacher_forcing
from minwm.models.presets import preset
from minwm.models.wan import Wan, WanConfig

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]


@torch.no_grad()
def test_frames_with_one_timestep_each_agree_with_a_timestep_for_the_clip(new_backbone: NewBackbone) -> None:
    """Modulation is per frame: without attention between frames, each frame is what it is alone."""
    torch.manual_seed(0)
    backbone = new_backbone(conditions=())
    model = backbone.model
    latents, timesteps = torch.randn(1, 3, 4, 4, 6), torch.tensor([[0.0, 412.5, 1000.0]])
    prompt = model.prompt(torch.randint(1, 257, (1, 12)))

    class Apart(Full):
        """Frames that see only themselves, all at position 0."""

        @property
        def positions(self) -> tuple[int, ...]:
            return (0,) * self.frames

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
            frames = zip(*(x.chunk(self.frames, 1) for x in (q, k, v)), strict=True)
            return torch.cat([Full.attend(self, layer, *frame) for frame in frames], 1)

    together = model(latents, timesteps, prompt, Apart(3))
    for f in range(3):
        alone = model(latents[:, f : f + 1], timesteps[:, f : f + 1], prompt, Full(1))
        torch.testing.assert_close(together[:, f : f + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_streams_of_a_batch_do_not_mix(new_backbone: NewBackbone) -> None:
    torch.manual_seed(0)
    backbone = new_backbone(conditions=())
    model, text = backbone.model, torch.randint(0, 257, (3, 12))
    latents, timesteps = torch.randn(3, 4, 4, 4, 6), 1000 * torch.rand(3, 4)
    context = teacher_forcing(2, backbone.config.history)
    together = model(latents, timesteps, model.prompt(text), context)
    for b in range(3):
        one = slice(b, b + 1)
        alone = model(latents[one], timesteps[one], model.prompt(text[one]), context)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prompt_and_timestep_matter_frame_by_frame(new_backbone: NewBackbone) -> None:
    torch.manual_seed(0)
    backbone = new_backbone(conditions=())
    model, latents = backbone.model, torch.randn(1, 2, 4, 4, 6)
    one, other = (model.prompt(torch.randint(1, 257, (1, 12))) for _ in range(2))
    base = model(latents, torch.tensor([[500.0, 500.0]]), one, Full(2))
    assert not torch.allclose(model(latents, torch.tensor([[500.0, 500.0]]), other, Full(2)), base, atol=1e-3)
    assert not torch.allclose(model(latents, torch.tensor([[500.0, 400.0]]), one, Full(2)), base, atol=1e-3)


def test_no_byte_is_embedded_as_nothing_and_is_never_trained() -> None:
    model = Wan(WanConfig(dim=16, layers=1, heads=1, ffn_dim=8, channels=4, text_dim=8, text_length=4, byte_text=True))
    embedded = model.byte_embedding(torch.zeros(1, 4, dtype=torch.int64))
    assert torch.equal(embedded, torch.zeros(1, 4, 8))
    model.byte_embedding(torch.tensor([[0, 5]])).sum().backward()  # type: ignore[no-untyped-call]
    gradient = model.byte_embedding.weight.grad
    assert gradient is not None
    assert gradient[0].abs().sum() == 0
    assert gradient[5].abs().sum() > 0


def test_new_models_start_without_a_say_of_the_cameras() -> None:
    model = Wan(WanConfig(dim=16, layers=2, heads=1, ffn_dim=8, conditions=("camera_prope",)))
    for block in model.blocks:
        assert not block.self_attn.prope_o.weight.any()
        assert not block.self_attn.prope_o.bias.any()


@pytest.mark.parametrize(("dim", "heads"), [(30, 4), (36, 6)])
def test_a_head_size_that_cannot_be_grouped_by_four_is_refused(dim: int, heads: int) -> None:
    with pytest.raises(ConfigError, match=f"dim={dim}, heads={heads}: expected a head size"):
        WanConfig(dim=dim, layers=1, heads=heads, ffn_dim=8)


def test_the_doom_preset_is_within_its_contract() -> None:
    config = preset("wan-doom")
    parameters = sum(p.numel() for p in Wan(config.architecture).parameters())
    assert 10e6 <= parameters <= 14e6
    assert (config.history.chunk, config.history.window, config.history.sink) == (2, 16, 0)
    assert sorted(config.levels) == [1, 2, 4, 8]
    assert config.architecture.text_length == 64


def test_unknown_presets_and_step_counts_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset 'wan-dom': unknown, expected one of wan-doom, wan2\.1"):
        preset("wan-dom")
    with pytest.raises(ConfigError, match=r"steps=3: wan-doom samples in one of \[1, 2, 4, 8\] steps"):
        preset("wan-doom").sampling_levels(3)
