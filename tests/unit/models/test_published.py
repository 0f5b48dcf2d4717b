"""Names of published tensors: told apart, stripped of what training wrapped around them, and exchanged for ours."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minwm.errors import CheckpointError
from minwm.models.hunyuan import Hunyuan, HunyuanConfig
from minwm.models.presets import preset
from minwm.models.published import absent_branches, as_diffusers, diffusers_config, read_published, stripped
from minwm.models.sources import InMemory, Tensors
from minwm.models.wan import Wan, WanConfig

pytestmark = pytest.mark.unit

WAN = WanConfig(dim=32, layers=2, heads=2, ffn_dim=48, channels=4, text_dim=8, text_length=12)
HUNYUAN = HunyuanConfig(
    dim=32, layers=2, heads=2, mlp_dim=64, channels=4, axes=(4, 6, 6), text_dim=24, glyph_dim=20, vision_dim=28
)
INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def wan_name(official: str) -> str:
    """Diffusers' name by the replacements, in their order, that Diffusers documents."""
    for old, new in (
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("modulation", "scale_shift_table"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("norm3", "norm2"),
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
    ):
        official = official.replace(old, new)
    return re.sub(r"(attn\d)\.([qkvo])\.", lambda m: f"{m[1]}.to_{'out.0' if m[2] == 'o' else m[2]}.", official)


def hunyuan_tensors(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors, rule by rule."""
    rules = [
        (r"^img_in\.", "x_embedder."),
        (r"^txt_in\.input_embedder", "context_embedder.proj_in"),
        (r"^txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
        (r"^txt_in\.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
        (r"^txt_in\.individual_token_refiner\.blocks", "context_embedder.token_refiner.refiner_blocks"),
        (r"^time_in", "time_embed.timestep_embedder"),
        (r"timestep_embedder\.mlp\.0", "timestep_embedder.linear_1"),
        (r"timestep_embedder\.mlp\.2", "timestep_embedder.linear_2"),
        (r"^byt5_in\.layernorm", "context_embedder_2.norm"),
        (r"^byt5_in\.fc(\d)", r"context_embedder_2.linear_\1"),
        (r"^vision_in\.proj\.0", "image_embedder.norm_in"),
        (r"^vision_in\.proj\.1", "image_embedder.linear_1"),
        (r"^vision_in\.proj\.3", "image_embedder.linear_2"),
        (r"^vision_in\.proj\.4", "image_embedder.norm_out"),
        (r"^cond_type_embedding", "cond_type_embed"),
        (r"^double_blocks", "transformer_blocks"),
        (r"img_mod\.", "norm1."),
        (r"txt_mod\.", "norm1_context."),
        (r"img_attn_([qk])_norm", r"attn.norm_\1"),
        (r"txt_attn_([qk])_norm", r"attn.norm_added_\1"),
        (r"img_attn_([qkv])\.", r"attn.to_\1."),
        (r"txt_attn_([qkv])\.", r"attn.add_\1_proj."),
        (r"img_attn_proj|self_attn_proj", "attn.to_out.0"),
        (r"txt_attn_proj", "attn.to_add_out"),
        (r"(?:img_|\.)mlp\.fc1", ".ff.net.0.proj"),
        (r"(?:img_|\.)mlp\.fc2", ".ff.net.2"),
        (r"txt_mlp\.fc1", "ff_context.net.0.proj"),
        (r"txt_mlp\.fc2", "ff_context.net.2"),
        (r"\.\.", "."),
        (r"^final_layer\.linear", "proj_out"),
        (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
        (r"adaLN_modulation\.1", "norm_out.linear"),
    ]
    theirs = {}
    for name, value in official.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name.startswith("norm_out"):
            shift, scale = value.chunk(2)
            theirs[name] = torch.cat([scale, shift])
        elif "self_attn_qkv" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("self_attn_qkv", f"attn.to_{part}")] = rows
        else:
            theirs[name] = value
    return theirs


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Random values of every tensor's shape: no two alike, and none at its first value."""
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) for name, value in model.state_dict().items()}


def read_all(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensors.read(name) for name in tensors.shapes}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_wan_s_tensors_get_the_names_that_diffusers_gives_them() -> None:
    ours = weights(Wan(WAN))
    assert_same(read_all(as_diffusers(InMemory(ours), WAN, "here")), {wan_name(name): v for name, v in ours.items()})


def test_hunyuanvideo_s_tensors_become_those_of_diffusers() -> None:
    ours = weights(Hunyuan(HUNYUAN))
    assert_same(read_all(as_diffusers(InMemory(ours), HUNYUAN, "here")), hunyuan_tensors(ours))


@pytest.mark.parametrize(
    ("build", "title"),
    [(lambda: (Wan(WAN), WAN), "Wan 2.1"), (lambda: (Hunyuan(HUNYUAN), HUNYUAN), "HunyuanVideo-1.5")],
    ids=["wan", "hunyuan"],
)
def test_official_to_diffusers_and_back_is_bitwise_the_same(
    build: Callable[[], tuple[nn.Module, WanConfig | HunyuanConfig]], title: str
) -> None:
    model, architecture = build()
    official = weights(model)
    found, ours = read_published(InMemory(official), "official")
    assert found.title == title
    theirs = read_all(as_diffusers(ours, architecture, "ours"))
    found, back = read_published(InMemory(theirs), "theirs")
    assert found.title == f"{title} (Diffusers)"
    assert_same(read_all(back), official)


def test_the_discrete_action_s_embedding_becomes_the_condition_s() -> None:
    model = Hunyuan(HunyuanConfig(**{**vars(HUNYUAN), "conditions": ("camera_prope", "action_timestep")}))
    ours = weights(model)
    official = {name.replace("conditions.action_timestep", "action_in"): value for name, value in ours.items()}
    assert {name for name in official if name.startswith("action_in.")} == {
        f"action_in.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    found, read = read_published(InMemory(official), "here")
    assert found.title == "HY-WorldPlay"
    assert_same(read_all(read), ours)


@given(
    wrapped=st.lists(
        st.tuples(st.sampled_from(list(Wan(WAN).state_dict())), st.lists(st.sampled_from(INFIXES), max_size=4)),
        min_size=1,
        unique_by=lambda pair: pair[0],
    ),
    places=st.randoms(use_true_random=False),
    prefix=st.sampled_from(["", "model."]),
)
def test_infixes_are_stripped_wherever_they_are(
    wrapped: list[tuple[str, list[str]]], places: object, prefix: str
) -> None:
    found = {}
    for name, infixes in wrapped:
        parts = [f"{part}." for part in (prefix + name).split(".")]
        for infix in infixes:
            parts.insert(places.randrange(len(parts)), infix)  # type: ignore[attr-defined]
        found["".join(parts).removesuffix(".")] = name
    plan = stripped(found, "here")
    assert {rows[0].name: name for name, rows in plan.items()} == found


def test_a_training_checkpoint_is_recognised_through_its_wrapping() -> None:
    ours = weights(Wan(WanConfig(**{**vars(WAN), "conditions": ("camera_prope",)})))
    saved = {f"model._fsdp_wrapped_module.{name}": value for name, value in ours.items()}
    found, read = read_published(InMemory(saved), "model.pt")
    assert found.title == "minWM Wan 2.1"
    assert_same(read_all(read), ours)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.pt: a\.w and a\._orig_mod\.w are both a\.w"):
        stripped(["a.w", "a._orig_mod.w"], "model.pt")


def test_an_unknown_checkpoint_is_refused_with_what_it_holds_and_what_is_known() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_published(InMemory({"encoder.conv1.weight": torch.ones(1)}), "vae.safetensors")
    message = str(caught.value)
    assert "vae.safetensors: looks like none of the known formats (it holds encoder.conv1.weight, …)" in message
    assert "HY-WorldPlay" in message


def test_unknown_tensors_and_parts_of_a_lost_layer_keep_their_names() -> None:
    theirs = hunyuan_tensors(weights(Hunyuan(HUNYUAN)))
    lost = theirs.pop("context_embedder.token_refiner.refiner_blocks.1.attn.to_k.weight")
    theirs["context_embedder.extra.weight"] = lost
    _, ours = read_published(InMemory(theirs), "here")
    expected = Hunyuan(HUNYUAN).state_dict().keys()
    refiner = "context_embedder.token_refiner.refiner_blocks.1.attn"
    assert ours.shapes.keys() - expected == {
        "context_embedder.extra.weight",
        f"{refiner}.to_q.weight",
        f"{refiner}.to_v.weight",
    }
    assert expected - ours.shapes.keys() == {"txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight"}


def test_an_unknown_tensor_cannot_take_a_known_one_s_place() -> None:
    official = weights(Hunyuan(HUNYUAN))
    official["action_in.mlp.0.weight"] = torch.ones(1)
    official["conditions.action_timestep.mlp.0.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"are both conditions\.action_timestep\.mlp\.0\.weight"):
        read_published(InMemory(official), "here")


def test_parts_of_one_layer_that_do_not_go_together_are_refused() -> None:
    theirs = hunyuan_tensors(weights(Hunyuan(HUNYUAN)))
    theirs["context_embedder.token_refiner.refiner_blocks.0.attn.to_k.weight"] = torch.ones(32, 5)
    with pytest.raises(CheckpointError, match=r"attn\.to_k\.weight \(32, 5\).*do not go together"):
        read_published(InMemory(theirs), "here")


def test_shapes_are_known_before_a_value_is_read() -> None:
    class Unreadable(InMemory):
        def read(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was read")

    theirs = {name: value.to("meta") for name, value in hunyuan_tensors(weights(Hunyuan(HUNYUAN))).items()}
    _, ours = read_published(Unreadable(theirs), "here")
    expected = {name: value.shape for name, value in Hunyuan(HUNYUAN).state_dict().items()}
    assert {name: value.shape for name, value in ours.shapes.items()} == expected


def test_diffusers_has_no_place_for_conditions() -> None:
    ours = weights(Wan(WanConfig(**{**vars(WAN), "conditions": ("camera_prope",)})))
    with pytest.raises(CheckpointError) as caught:
        as_diffusers(InMemory(ours), WAN, "folder")
    for block in range(2):
        assert f"blocks.{block}.self_attn.prope_o.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (
            "wan2.1-t2v-1.3b",
            {
                "_class_name": "WanTransformer3DModel",
                "added_kv_proj_dim": None,
                "attention_head_dim": 128,
                "cross_attn_norm": True,
                "eps": 1e-06,
                "ffn_dim": 8960,
                "freq_dim": 256,
                "in_channels": 16,
                "num_attention_heads": 12,
                "num_layers": 30,
                "out_channels": 16,
                "patch_size": [1, 2, 2],
                "qk_norm": "rms_norm_across_heads",
                "text_dim": 4096,
            },
        ),
        (
            "hunyuanvideo-1.5-8b",
            {
                "_class_name": "HunyuanVideo15Transformer3DModel",
                "attention_head_dim": 128,
                "image_embed_dim": 1152,
                "in_channels": 65,
                "mlp_ratio": 4.0,
                "num_attention_heads": 16,
                "num_layers": 54,
                "num_refiner_layers": 2,
                "out_channels": 32,
                "patch_size": 1,
                "patch_size_t": 1,
                "qk_norm": "rms_norm",
                "rope_axes_dim": [16, 56, 56],
                "rope_theta": 256.0,
                "target_size": 640,
                "task_type": "i2v",
                "text_embed_2_dim": 1472,
                "text_embed_dim": 3584,
                "use_meanflow": False,
            },
        ),
    ],
)
def test_diffusers_configuration_is_the_published_one(name: str, published: dict[str, object]) -> None:
    ours = diffusers_config(preset(name).architecture)
    assert {key: ours[key] for key in published} == published
    unpublished = {"image_dim": None, "rope_max_seq_len": 1024}  # the class' defaults
    assert all(ours[key] == unpublished[key] for key in ours.keys() - published.keys())


def test_branches_are_absent_as_a_whole_or_not_at_all() -> None:
    conditions = ("camera_prope", "action_timestep")
    expected = Wan(WanConfig(**{**vars(WAN), "conditions": conditions})).state_dict().keys()
    base = Wan(WAN).state_dict().keys()
    assert set(absent_branches(expected, base)) == expected - base
    with_one = base | {"blocks.1.self_attn.prope_o.weight"}
    assert {name.split(".")[0] for name in absent_branches(expected, with_one)} == {"conditions"}
