"""What the MMDiT promises its callers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minwm.errors import ConfigError, InputError
from minwm.models.backbones import Backbone
from minwm.models.context import Context, Full, History, teacher_forcing
from minwm.models.hunyuan import Hunyuan, HunyuanConfig
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.text import Embedded

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewText = Callable[..., Any]
HISTORY = History(chunk=2, window=4)


@pytest.fixture
def model(new_backbone: NewBackbone) -> Hunyuan:
    made = new_backbone(kind="hunyuan", conditions=()).model
    assert isinstance(made, Hunyuan)
    return made


def contexts() -> list[Context]:
    return [Full(4), teacher_forcing(2, HISTORY)]


@torch.no_grad()
def forward(
    model: Hunyuan, text: HunyuanText, context: Context, streams: slice = slice(None), **changes: Any
) -> Tensor:
    random = torch.Generator().manual_seed(3)
    latents, timesteps = torch.randn(3, 4, 4, 4, 6, generator=random), 1000 * torch.rand(3, 4, generator=random)
    prompt = model.prompt(text, bidirectional=context.bidirectional)
    inputs = {"latents": latents[streams], "timesteps": timesteps[streams], "prompt": prompt, "context": context}
    out: Tensor = model(**{**inputs, **changes})
    return out


def part_of(text: HunyuanText, streams: slice) -> HunyuanText:
    def cut(part: Embedded) -> Embedded:
        return Embedded(part.states[streams], part.mask[streams])

    return HunyuanText(cut(text.language), cut(text.glyphs), cut(text.vision))


@pytest.mark.parametrize("context", contexts(), ids=["bidirectional", "causal"])
def test_streams_of_a_batch_do_not_mix_whatever_their_prompts_lengths(
    model: Hunyuan, new_text: NewText, context: Context
) -> None:
    text = new_text(model.config, 3)
    together = forward(model, text, context)
    for number in range(3):
        one = slice(number, number + 1)
        alone = forward(model, part_of(text, one), context, one)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", contexts(), ids=["bidirectional", "causal"])
def test_what_lies_in_the_padding_is_never_seen(model: Hunyuan, new_text: NewText, context: Context) -> None:
    text = new_text(model.config, 3)

    def with_junk(part: Embedded) -> Embedded:
        return Embedded(torch.where(part.mask[..., None], part.states, torch.nan), part.mask)

    junk = HunyuanText(with_junk(text.language), with_junk(text.glyphs), with_junk(text.vision))
    torch.testing.assert_close(forward(model, junk, context), forward(model, text, context), rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", contexts(), ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["language", "glyphs", "vision"])
def test_every_part_of_the_prompt_is_heard(model: Hunyuan, new_text: NewText, context: Context, name: str) -> None:
    text = new_text(model.config, 3)
    text = replace(text, **{name: Embedded(getattr(text, name).states, torch.ones_like(getattr(text, name).mask))})
    other = Embedded(getattr(text, name).states + 1, getattr(text, name).mask)
    # a shift alone would vanish in the layer norms that begin two of the parts
    other = Embedded(other.states * torch.linspace(0.5, 2, other.states.shape[-1]), other.mask)
    changed = forward(model, replace(text, **{name: other}), context)
    assert not torch.allclose(changed, forward(model, text, context), atol=1e-3)


@torch.no_grad()
def test_each_frame_is_modulated_by_its_own_timestep(model: Hunyuan, new_text: NewText) -> None:
    """Without attention between frames, each frame is what it is alone."""

    class Apart(Full):
        """Frames that see only themselves, all at position 0, in a causal pass."""

        bidirectional = False

        @property
        def positions(self) -> tuple[int, ...]:
            return (0,) * self.frames

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Any = None) -> Tensor:
            frames = zip(*(x.chunk(self.frames, 1) for x in (q, k, v)), strict=True)
            return torch.cat([Full.attend(self, layer, *frame, beside) for frame in frames], 1)

    torch.manual_seed(0)
    latents, timesteps = torch.randn(1, 3, 4, 4, 6), torch.tensor([[0.0, 412.5, 1000.0]])
    prompt = model.prompt(new_text(model.config, 1))
    together = model(latents, timesteps, prompt, Apart(3))
    for f in range(3):
        alone = model(latents[:, f : f + 1], timesteps[:, f : f + 1], prompt, Apart(1))
        torch.testing.assert_close(together[:, f : f + 1], alone, rtol=0, atol=1e-5)


def test_modulation_is_computed_once_per_frame_and_text_once_per_prompt(model: Hunyuan, new_text: NewText) -> None:
    rows: list[int] = []
    block = model.double_blocks[0]
    block.get_submodule("img_mod.linear").register_forward_hook(lambda m, x, y: rows.append(x[0].shape[:-1].numel()))
    asked: list[int] = []
    block.get_submodule("txt_attn_q").register_forward_hook(lambda m, x, y: asked.append(1))
    with torch.no_grad():
        prompt = model.prompt(new_text(model.config, 3))
        assert len(asked) == 1
        for _ in range(3):
            model(torch.randn(3, 4, 4, 4, 6), torch.rand(3, 4), prompt, teacher_forcing(2, HISTORY))
    assert rows == [3 * 4] * 3
    assert len(asked) == 1


def test_the_text_is_embedded_at_timestep_zero_unless_at_the_frames_own(
    new_backbone: NewBackbone, new_text: NewText
) -> None:
    """With frames all at timestep 0 the two are the same; at another they are not."""
    zero, frames = (
        new_backbone(kind="hunyuan", conditions=(), text_timestep=mode).model for mode in ("zero", "frames")
    )
    text = new_text(zero.architecture, 3)
    clean, noisy = torch.zeros(3, 4), torch.full((3, 4), 600.0)
    same = (forward(model, text, Full(4), timesteps=clean) for model in (zero, frames))
    torch.testing.assert_close(*same, rtol=0, atol=1e-6)
    one, other = (forward(model, text, Full(4), timesteps=noisy) for model in (zero, frames))
    assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(ConfigError, match="text_timestep: is 'frames', expected 'zero' for causal passes"):
        frames.prompt(text)


def test_gradients_reach_the_text_in_causal_passes(model: Hunyuan, new_text: NewText) -> None:
    prompt = model.prompt(new_text(model.config, 3))
    out = model(torch.randn(3, 4, 4, 4, 6), torch.rand(3, 4), prompt, teacher_forcing(2, HISTORY))
    weights = [model.txt_in.input_embedder.weight, model.vision_in.proj[1].weight, model.byt5_in.fc1.weight]
    for gradient in torch.autograd.grad(out.square().sum(), weights):
        assert gradient.any()


def test_a_prompt_for_the_other_kind_of_pass_is_refused(model: Hunyuan, new_text: NewText) -> None:
    text = new_text(model.config, 3)
    with pytest.raises(InputError, match="prompt: was made for causal passes, expected one for bidirectional passes"):
        forward(model, text, Full(4), prompt=model.prompt(text))
    with pytest.raises(InputError, match="prompt: was made for bidirectional passes, expected one for causal passes"):
        forward(model, text, teacher_forcing(2, HISTORY), prompt=model.prompt(text, bidirectional=True))


def test_prompts_that_do_not_fit_are_named(model: Hunyuan, new_text: NewText) -> None:
    text = new_text(model.config, 2)
    long = Embedded(torch.randn(2, 8, 10), torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(InputError, match=r"prompt\.language: has 8 tokens, expected at most 7"):
        model.prompt(replace(text, language=long))
    with pytest.raises(InputError, match=r"prompt\.glyphs: has states \(2, 8, 10\), expected \(b, l, 6\)"):
        model.prompt(replace(text, glyphs=long))
    silent = Embedded(text.language.states, torch.tensor([[True], [False]]).expand(2, 7))
    with pytest.raises(InputError, match=r"prompt\.language: has no token in one of the streams"):
        model.prompt(replace(text, language=silent))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"latents": torch.randn(3, 4, 5, 4, 6)}, r"latents have shape \(3, 4, 5, 4, 6\), expected \(b, f, 4, y, x\)"),
        ({"latents": torch.randn(3, 2, 4, 4, 6)}, "latents have 2 frames, expected the context's 4"),
        ({"timesteps": torch.rand(3)}, r"timesteps have shape \(3,\), expected \(3, 4\): one per frame"),
    ],
)
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_latents_and_timesteps_that_do_not_fit_are_named(
    new_backbone: NewBackbone, new_text: NewText, kind: str, changes: dict[str, Tensor], complaint: str
) -> None:
    model: Any = new_backbone(kind=kind, conditions=()).model
    with pytest.raises(InputError, match=complaint):
        forward(model, new_text(model.config, 3), Full(4), **changes)


def test_wan_refuses_sides_that_its_patch_does_not_divide_and_prompts_that_are_too_long_or_of_another_kind(
    new_backbone: NewBackbone,
) -> None:
    model: Any = new_backbone(conditions=()).model
    bytes_ = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(InputError, match="latents are 5x6, expected sides in multiples of 2 and 2"):
        model(torch.randn(1, 2, 4, 5, 6), torch.rand(1, 2), model.prompt(bytes_), Full(2))
    with pytest.raises(InputError, match="prompt: has 13 tokens, expected at most 12"):
        model.prompt(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(InputError, match=r"prompt: is Embedded, the model takes bytes \(b, l\)"):
        model.prompt(Embedded(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)))
    with pytest.raises(InputError, match=r"prompt: is of 3 streams, expected 1 as the latents"):
        model(torch.randn(1, 2, 4, 4, 6), torch.rand(1, 2), model.prompt(bytes_.expand(3, -1)), Full(2))
    published: Any = new_backbone(conditions=(), byte_text=False).model
    with pytest.raises(InputError, match="prompt: is Tensor, the model takes embeddings of 8 channels"):
        published.prompt(bytes_)
    with pytest.raises(InputError, match="prompt: has 9 channels, expected 8"):
        published.prompt(Embedded(torch.randn(1, 3, 9), torch.ones(1, 3, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"heads": 3}, "dim=32, heads=3, axes=.*: expected a head size"),
        ({"axes": (4, 4, 4)}, r"axes=\(4, 4, 4\): expected a head size that is .* the sum of the axes"),
        ({"patch": (2, 2)}, r"patch=\(2, 2\): expected \(1, 1\)"),
        ({"conditions": ("first_image",)}, "first_image is part of every HunyuanVideo 1.5"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], complaint: str) -> None:
    sizes: dict[str, Any] = {"dim": 32, "layers": 1, "heads": 2, "mlp_dim": 48, "axes": (4, 6, 6)}
    with pytest.raises(ConfigError, match=complaint):
        HunyuanConfig(**{**sizes, **changes})
