"""Folders that Diffusers writes are converted whole, and those that we write for it, it reads without a complaint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minwm.models.backbones import load_backbone
from minwm.models.context import History
from minwm.models.conversion import convert, export_diffusers, inspect
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.presets import WorldConfig
from minwm.models.published import diffusers_config
from minwm.models.wan import WanConfig

pytestmark = [pytest.mark.parity, pytest.mark.slow]

WAN = WanConfig(dim=32, layers=2, heads=2, ffn_dim=48, channels=4, text_dim=8, text_length=12)
HUNYUAN = HunyuanConfig(
    dim=32, layers=2, heads=2, mlp_dim=128, channels=4, axes=(4, 6, 6), text_dim=24, glyph_dim=20, vision_dim=28
)


def diffusers_class(architecture: WanConfig | HunyuanConfig) -> Any:
    import diffusers

    return getattr(diffusers, diffusers_config(architecture)["_class_name"])


@pytest.mark.parametrize("architecture", [WAN, HUNYUAN], ids=["wan", "hunyuan"])
def test_what_diffusers_saved_is_loaded_and_given_back_bitwise(
    tmp_path: Path, architecture: WanConfig | HunyuanConfig
) -> None:
    torch.manual_seed(0)
    cls = diffusers_class(architecture)
    model = cls(**{key: value for key, value in diffusers_config(architecture).items() if key != "_class_name"})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="50KB")
    assert inspect(str(tmp_path / "theirs")).format.endswith("(Diffusers)")

    config = WorldConfig(
        preset="tiny", architecture=architecture, history=History(chunk=2, window=4), shift=5.0, levels={1: (1.0,)}
    )
    convert(str(tmp_path / "theirs"), config, tmp_path / "ours")
    load_backbone(tmp_path / "ours")

    export_diffusers(tmp_path / "ours", tmp_path / "again")
    again = cls.from_config(cls.load_config(tmp_path / "again"))
    again.load_state_dict(load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"))
    expected, got = model.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
