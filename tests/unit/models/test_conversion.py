"""Published checkpoints converted on disk: strict, bitwise, with the provenance written down."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minwm.errors import CheckpointError
from minwm.models import presets
from minwm.models.backbones import load_backbone, new_model
from minwm.models.checkpoints import CONFIG, read_config, read_weights
from minwm.models.context import History
from minwm.models.conversion import convert, drawn_together, export_diffusers, inspect
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.presets import WorldConfig
from minwm.models.wan import WanConfig

pytestmark = pytest.mark.unit


def world(architecture: WanConfig | HunyuanConfig) -> WorldConfig:
    return WorldConfig(
        preset="tiny", architecture=architecture, history=History(chunk=2, window=4), shift=5.0, levels={1: (1.0,)}
    )


WAN = world(WanConfig(dim=32, layers=2, heads=2, ffn_dim=48, channels=4, text_dim=8, text_length=12))
HUNYUAN = world(
    HunyuanConfig(
        dim=32, layers=2, heads=2, mlp_dim=64, channels=4, axes=(4, 6, 6), text_dim=24, glyph_dim=20, vision_dim=28
    )
)


def steered(base: WorldConfig, *conditions: str) -> WorldConfig:
    return replace(base, architecture=replace(base.architecture, conditions=conditions))  # type: ignore[arg-type]


def official(config: WorldConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the publisher's names."""
    torch.manual_seed(0)
    state = new_model(config.architecture).state_dict()
    names = {name: name.replace("conditions.action_timestep", "action_in") for name in state}
    return {names[name]: torch.randn(value.shape).to(dtype) for name, value in state.items()}


def contents(folder: Path) -> dict[str, Tensor]:
    files = read_weights(folder)
    return {name: files.read(name) for name in files.shapes}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("config", [WAN, HUNYUAN], ids=["wan", "hunyuan"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
def test_official_to_ours_to_diffusers_to_ours_is_bitwise_the_same(
    tmp_path: Path, config: WorldConfig, shard_bytes: int
) -> None:
    published = official(config)
    save_file(published, tmp_path / "official.safetensors")
    convert(str(tmp_path / "official.safetensors"), config, tmp_path / "ours", shard_bytes=shard_bytes)
    export_diffusers(tmp_path / "ours", tmp_path / "theirs", shard_bytes=shard_bytes)
    convert(str(tmp_path / "theirs"), config, tmp_path / "again", shard_bytes=shard_bytes)
    assert_same(contents(tmp_path / "ours"), published)
    assert_same(contents(tmp_path / "again"), published)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or shard_bytes == 10**9


def test_minwm_s_model_pt_is_converted_cast_and_loaded(tmp_path: Path) -> None:
    config = steered(WAN, "camera_prope")
    average, generator = official(config), official(config)
    average["head.modulation"] += 1
    states = {
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": value for name, value in average.items()},
        "generator": {f"model.{name}": value for name, value in generator.items()},
    }
    torch.save(states, tmp_path / "model.pt")
    convert(str(tmp_path), config, tmp_path / "ours", dtype=torch.bfloat16)
    backbone = load_backbone(tmp_path / "ours", torch.bfloat16)
    assert backbone.config == config
    assert_same(
        {name: value.clone() for name, value in backbone.model.state_dict().items()},
        {name: value.bfloat16() for name, value in average.items()},
    )


def test_hy_worldplay_s_weights_are_converted(tmp_path: Path) -> None:
    config = steered(HUNYUAN, "camera_prope", "action_timestep")
    published = official(config)
    folder = tmp_path / "ar_distilled_action_model"
    folder.mkdir()
    save_file(published, folder / "diffusion_pytorch_model.safetensors")
    convert(str(folder), config, tmp_path / "ours")
    expected = {name.replace("action_in", "conditions.action_timestep"): value for name, value in published.items()}
    assert_same(contents(tmp_path / "ours"), expected)
    assert read_config(tmp_path / "ours", "backbone")["about"]["format"] == "HY-WorldPlay"


def test_provenance_names_the_format_and_every_file_with_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    save_file(official(WAN), path)
    convert(str(path), WAN, tmp_path / "ours")
    data = path.read_bytes()
    assert read_config(tmp_path / "ours", "backbone")["about"] == {
        "source": str(path),
        "format": "Wan 2.1",
        "files": [{"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}],
        "added": [],
    }


@pytest.mark.parametrize("base", [WAN, HUNYUAN], ids=["wan", "hunyuan"])
def test_branches_that_a_base_model_lacks_are_added_only_when_asked_for_and_change_nothing(
    tmp_path: Path, base: WorldConfig
) -> None:
    config = steered(base, "camera_prope", "action_timestep")
    published = official(base, torch.bfloat16)
    save_file(published, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path / "base.safetensors"), config, tmp_path / "ours")
    message = str(caught.value)
    for name in new_model(config.architecture).state_dict().keys() - published.keys():
        assert f"missing {name}" in message
    assert message.endswith("branches that a base model lacks are added with --add-conditions")
    assert not (tmp_path / "ours").exists()

    added = convert(str(tmp_path / "base.safetensors"), config, tmp_path / "ours", add_conditions=True)
    ours = contents(tmp_path / "ours")
    assert_same({name: ours[name] for name in published}, published)
    assert ours.keys() - published.keys() == set(added)
    effects = [name for name in added if "prope" in name or name.startswith("conditions.action_timestep.mlp.2")]
    assert len(effects) == 2 * base.architecture.layers + 2
    for name in added:
        assert ours[name].any() == (name not in effects), name
        assert ours[name].dtype == torch.bfloat16
    load_backbone(tmp_path / "ours")


def test_a_branch_that_lost_a_layer_is_not_filled_up(tmp_path: Path) -> None:
    config = steered(WAN, "camera_prope")
    published = official(config)
    del published["blocks.1.self_attn.prope_o.weight"]
    save_file(published, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit tiny: missing blocks\.1\.self_attn\.prope_o\.weight$"):
        convert(str(tmp_path), config, tmp_path / "ours", add_conditions=True)


def test_a_checkpoint_of_another_backbone_is_told_what_it_looks_like(tmp_path: Path) -> None:
    save_file(official(WAN), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path), HUNYUAN, tmp_path / "ours")
    assert "looks like Wan 2.1 (backbone wan), expected weights for tiny (backbone hunyuan)" in str(caught.value)


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    published = official(WAN)
    del published["blocks.0.norm3.bias"]
    published["img_emb.proj.1.weight"] = torch.ones(2, 2)
    published["head.head.bias"] = torch.ones(3)
    save_file(published, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path), WAN, tmp_path / "ours", add_conditions=True)
    for problem in (
        "missing blocks.0.norm3.bias",
        "unexpected img_emb.proj.1.weight",
        "head.head.bias has shape (3,), expected (16,)",
    ):
        assert problem in str(caught.value)


def test_a_folder_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    save_file(official(WAN), tmp_path / "model.safetensors")
    for write in (
        lambda: convert(str(tmp_path), WAN, tmp_path),
        lambda: export_diffusers(tmp_path, tmp_path / "model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match="exists and is not empty, expected a new folder"):
            write()


def test_only_base_models_are_written_for_diffusers(tmp_path: Path) -> None:
    config = steered(WAN, "camera_prope")
    save_file(official(config), tmp_path / "model.safetensors")
    convert(str(tmp_path), config, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.self_attn\.prope_o\.bias"):
        export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "ours" / CONFIG).write_text(json.dumps({"kind": "autoencoder", "config": {}}))
    with pytest.raises(CheckpointError, match="holds a 'autoencoder', expected a 'backbone'"):
        export_diffusers(tmp_path / "ours", tmp_path / "theirs")


def test_inspection_says_what_a_checkpoint_is_and_which_presets_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(WAN, architecture=replace(WAN.architecture, layers=4, text_dim=9))
    known = {"large": large, "other": HUNYUAN, "camera": steered(WAN, "camera_prope"), "same": WAN}
    monkeypatch.setattr(presets, "_PRESETS", known)
    published = official(WAN, torch.bfloat16)
    published["head.head.bias"] = published["head.head.bias"].float()
    path = tmp_path / "model.safetensors"
    save_file(published, path)
    found = inspect(str(path))
    parameters = sum(value.numel() for value in published.values())
    assert (found.source, found.format, found.tensors) == (str(path), "Wan 2.1", len(published))
    assert (found.parameters, found.bytes) == (parameters, 2 * parameters + 2 * 16)
    assert found.dtypes == {"bfloat16": len(published) - 1, "float32": 1}
    assert found.files[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(found.presets) == ["camera", "same", "large", "other"], "what fits comes first"
    assert found.presets["same"] == "fits"
    added = "blocks.{0..1}.self_attn.prope_o.weight, blocks.{0..1}.self_attn.prope_o.bias"
    assert found.presets["camera"] == f"fits with --add-conditions, which adds {added}"
    assert found.presets["other"] == "is another backbone (hunyuan)"
    problems = found.presets["large"]
    assert "text_embedding.0.weight has shape (32, 8), expected (32, 9)" in problems
    assert "missing blocks.{2..3}.norm3.bias" in problems
    assert len(problems) == 1 + sum(name.startswith("blocks.0.") for name in published)


def test_a_folder_of_ours_is_recognised_as_such(tmp_path: Path) -> None:
    save_file(official(WAN), tmp_path / "official.safetensors")
    convert(str(tmp_path / "official.safetensors"), WAN, tmp_path / "ours")
    assert inspect(str(tmp_path / "ours")).format == "backbone folder (Wan 2.1 names)"


def test_lines_of_blocks_are_drawn_together_into_runs() -> None:
    lines = [f"missing blocks.{number}.a" for number in (0, 1, 2, 5, 7, 8)] + ["b", "missing blocks.3.c"]
    assert drawn_together(lines) == ["missing blocks.{0..2,5,7..8}.a", "b", "missing blocks.3.c"]


@pytest.mark.parametrize(
    ("config", "change", "complaint"),
    [
        (WAN, {"num_attention_heads": 4, "attention_head_dim": 8}, "attention_head_dim is 8, expected 16; num_att"),
        (HUNYUAN, {"rope_theta": 10000.0}, "rope_theta is 10000.0, expected 256.0"),
    ],
    ids=["wan", "hunyuan"],
)
def test_what_shapes_do_not_show_is_compared_with_the_configuration_beside_the_weights(
    tmp_path: Path, config: WorldConfig, change: dict[str, float], complaint: str
) -> None:
    save_file(official(config), tmp_path / "official.safetensors")
    convert(str(tmp_path / "official.safetensors"), config, tmp_path / "ours")
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=f"is not tiny: {complaint}"):
        convert(str(tmp_path / "theirs"), config, tmp_path / "again")
    assert not (tmp_path / "again").exists()
