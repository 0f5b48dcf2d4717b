"""Costs, against PyTorch's own counter and what real models hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, new_model
from minwm.models.cache import Cached, KVCache
from minwm.models.conditions import Conditions
from minwm.models.context import Context, Full, History, teacher_forcing
from minwm.models.costs import (
    Pass,
    activation_bytes,
    chunk_flops,
    forward_flops,
    latent_size,
    parameters,
    prompt_bytes,
    prompt_tokens,
)
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.presets import preset, preset_names
from minwm.models.text import Embedded
from minwm.models.wan import WanConfig

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]

ROWS, COLUMNS = 4, 6


def longest_prompt(config: WanConfig | HunyuanConfig) -> Any:
    """What `prompt` takes, of as many tokens as the model takes."""

    def embedded(length: int, width: int) -> Embedded:
        return Embedded(torch.randn(1, length, width), torch.ones(1, length, dtype=torch.bool))

    if isinstance(config, WanConfig):
        return embedded(config.text_length, config.text_dim)
    return HunyuanText(
        language=embedded(config.text_length, config.text_dim),
        glyphs=embedded(config.glyph_length, config.glyph_dim),
        vision=embedded(config.vision_length, config.vision_dim),
    )


@torch.no_grad()
def counted(config: WanConfig | HunyuanConfig, context: Context, conditions: Conditions | None = None) -> int:
    """FLOPs of one forward, counted product by product."""
    model = new_model(config)
    frames = len(context.positions)
    prompt = model.prompt(longest_prompt(config), bidirectional=context.bidirectional)
    latents, timesteps = torch.randn(1, frames, config.channels, ROWS, COLUMNS), 1000 * torch.rand(1, frames)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no CPU kernel
        model(latents, timesteps, prompt, context, conditions)
    return counter.get_total_flops()


def contexts(config: WanConfig | HunyuanConfig, history: History) -> dict[str, tuple[Context, Pass]]:
    """A stream's last chunk, a masked pass over four frames, a bidirectional pass over three; and their shapes."""
    geometry = config.cache_geometry(ROWS, COLUMNS, history)
    tokens = geometry.tokens_per_frame
    start = history.chunk * (history.sink + history.window)
    cache, masked = KVCache(geometry, 1, torch.float32), replace(history, chunk=2, window=history.window + 1)
    return {
        "cached": (Cached(cache, start, history.chunk), Pass.cached(history, tokens)),
        "teacher-forced": (teacher_forcing(4, masked), Pass.teacher_forced(4, tokens, masked)),
        "bidirectional": (Full(3), Pass.full(3, tokens)),
    }


@st.composite
def architectures(draw: st.DrawFn) -> WanConfig | HunyuanConfig:
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from((8, 16)))
    common = {"dim": heads * head_dim, "heads": heads, "layers": draw(st.integers(1, 3))}
    common |= {"channels": draw(st.integers(1, 5)), "text_dim": draw(st.integers(4, 9))}
    common |= {"text_length": draw(st.integers(3, 9)), "frequencies": 2 * draw(st.integers(1, 9))}
    width = draw(st.integers(5, 50))
    if draw(st.booleans()):
        return WanConfig(**common, ffn_dim=width, patch=draw(st.sampled_from(((2, 2), (1, 2), (1, 1)))))
    side = head_dim // 4
    return HunyuanConfig(
        **common,
        mlp_dim=width,
        axes=(head_dim - 2 * side, side, side),
        refiner_layers=draw(st.integers(1, 2)),
        glyph_dim=draw(st.integers(2, 6)),
        glyph_hidden=draw(st.integers(2, 6)),
        glyph_length=draw(st.integers(2, 6)),
        vision_dim=draw(st.integers(2, 6)),
        vision_length=draw(st.integers(2, 6)),
    )


@settings(max_examples=25)
@given(
    config=architectures(),
    history=st.builds(
        lambda chunk, more, sink: History(chunk=chunk, window=chunk + more, sink=sink),
        st.integers(1, 2),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
)
def test_flops_are_those_that_a_counter_finds(config: WanConfig | HunyuanConfig, history: History) -> None:
    for name, (context, shape) in contexts(config, history).items():
        assert forward_flops(config, shape).total == counted(config, context), name


@pytest.mark.parametrize("name", ["cached", "teacher-forced", "bidirectional"])
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
@pytest.mark.parametrize(
    "conditions",
    [
        ("camera_prope",),
        ("camera_prope", "action_timestep"),
        ("camera_plucker", "action_attention"),
        ("camera_attention",),
        ("camera_prope", "camera_plucker", "camera_attention", "action_attention", "action_timestep"),
    ],
    ids="+".join,
)
def test_flops_of_conditions_are_within_a_percent(
    kind: str, conditions: tuple[Any, ...], name: str, new_backbone: NewBackbone, new_conditions: NewConditions
) -> None:
    """Left out: the frames' own camera matrices and rays."""
    config = new_backbone(kind=kind, conditions=conditions, **({"byte_text": False} if kind == "wan" else {}))
    architecture = config.config.architecture
    context, shape = contexts(architecture, History(chunk=2, window=4))[name]
    found = counted(architecture, context, new_conditions(1, shape.frames))
    assert 0.99 * found <= forward_flops(architecture, shape).total <= found


@pytest.mark.parametrize("prope_history", ["exact", "compat"])
def test_how_the_cache_holds_cameras_changes_no_flops(
    prope_history: str, new_backbone: NewBackbone, new_conditions: NewConditions
) -> None:
    architecture = new_backbone(kind="hunyuan", prope_history=prope_history).config.architecture
    context, shape = contexts(architecture, History(chunk=2, window=4))["cached"]
    assert forward_flops(architecture, shape).total == pytest.approx(
        counted(architecture, context, new_conditions(1, 2)), rel=0.01
    )


def test_a_first_image_costs_less_than_a_percent_of_a_pass_it_is_part_of(
    new_backbone: NewBackbone, new_conditions: NewConditions
) -> None:
    """It is left out of the formula: one frame in a stream has it, through one small layer."""
    architecture = new_backbone(conditions=("first_image",), byte_text=False, ffn_dim=256).config.architecture
    context, shape = contexts(architecture, History(chunk=2, window=4))["teacher-forced"]
    found = counted(architecture, context, new_conditions(1, shape.frames))
    assert 0.99 * found <= forward_flops(architecture, shape).total < found


def test_a_chunk_costs_its_steps_and_the_pass_that_commits_it() -> None:
    config = preset("minwm-wan2.1-1.3b")
    forward = forward_flops(config.architecture, Pass.cached(config.history, 1560))
    assert chunk_flops(config.architecture, config.history, 1560, steps=4) == 5 * forward.total
    assert forward.total == sum(
        (forward.linear, forward.modulation, forward.attention, forward.text, forward.conditions)
    )


def test_attention_by_camera_doubles_attention_among_frames() -> None:
    plain, camera = (preset(name) for name in ("wan2.1-t2v-1.3b", "minwm-wan2.1-1.3b"))
    shape = Pass.cached(plain.history, 1560)
    without, with_camera = (forward_flops(config.architecture, shape) for config in (plain, camera))
    assert with_camera.attention == 2 * without.attention
    assert (with_camera.linear, with_camera.text) == (without.linear, without.text)
    assert without.conditions == 0 < with_camera.conditions


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_parameters_and_bytes_are_those_of_the_real_thing(kind: str, new_backbone: NewBackbone) -> None:
    conditions = ("camera_prope", "camera_attention", "action_timestep")
    backbone = new_backbone(kind=kind, conditions=conditions, **({"byte_text": False} if kind == "wan" else {}))
    architecture, model = backbone.config.architecture, backbone.model
    assert parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())
    layers: Any = model.bfloat16().prompt(longest_prompt(architecture)).layers
    held = [(layer.keys, layer.values) if kind == "hunyuan" else layer for layer in layers]
    assert prompt_bytes(architecture, torch.bfloat16) == sum(k.nbytes + v.nbytes for k, v in held)
    assert held[0][0].shape[1] == prompt_tokens(architecture)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prope", [False, True])
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_activations_of_a_layer_are_about_what_autograd_keeps(
    kind: str, prope: bool, checkpointed: bool, new_backbone: NewBackbone, new_conditions: NewConditions
) -> None:
    sizes: dict[str, Any] = {"dim": 128, "conditions": ("camera_prope",) if prope else ()}
    sizes |= {"ffn_dim": 512, "byte_text": False} if kind == "wan" else {"mlp_dim": 512, "axes": (16, 24, 24)}

    side = 32 if kind == "wan" else 16  # 256 tokens a frame

    def kept(layers: int, frames: int) -> int:
        model = new_backbone(kind=kind, layers=layers, **sizes).model
        model.checkpoint_activations = checkpointed
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        stored: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                stored[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            prompt = model.prompt(longest_prompt(model.architecture), bidirectional=True)  # type: ignore[arg-type]
            latents, timesteps = torch.randn(1, frames, 4, side, side), torch.zeros(1, frames)
            model(latents, timesteps, prompt, Full(frames), Conditions(new_conditions(1, frames).cameras))
        return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())

    def said(layers: int, frames: int) -> int:
        architecture = new_backbone(kind=kind, layers=layers, **sizes).config.architecture
        return activation_bytes(architecture, 256 * frames, checkpointed=checkpointed)

    # what does not grow with both, layers and tokens, drops out: autocast's copies of weights, say
    found, expected = ((of(3, 6) - of(2, 6)) - (of(3, 4) - of(2, 4)) for of in (kept, said))
    assert expected == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("wan2.1-t2v-1.3b", 1.42), ("wan2.1-t2v-14b", 14.29), ("hunyuanvideo-1.5-8b", 8.33), ("wan-doom", 0.0115)],
)
def test_presets_have_the_sizes_of_the_published_models(name: str, billions: float) -> None:
    assert parameters(preset(name).architecture) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_takes_480_by_832_pixels_as_1560_tokens_a_frame(name: str) -> None:
    config = preset(name)
    geometry = config.architecture.cache_geometry(*latent_size(config.architecture, 480, 832), config.history)
    assert geometry.tokens_per_frame == 1560


@pytest.mark.parametrize(("name", "multiple"), [("wan-doom", 16), ("hy-worldplay-8b", 16)])
def test_pictures_that_are_no_whole_number_of_tokens_are_refused(name: str, multiple: int) -> None:
    architecture = preset(name).architecture
    with pytest.raises(ConfigError, match=f"height=100: expected a positive multiple of {multiple} pixels"):
        latent_size(architecture, 100, 128)
    with pytest.raises(ConfigError, match=f"width=0: expected a positive multiple of {multiple} pixels"):
        latent_size(architecture, 96, 0)
