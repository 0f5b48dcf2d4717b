"""Both backbones against Diffusers' classes: the same random weights, brought over by our converter, both ways.

Small configurations with the published proportions that matter (split of rotary axes, patch, refiner, three text
streams), and Wan 1.3B whole where there is memory for it. No published weights are involved:
`minwm checkpoints verify` repeats this on them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minwm.models.backbones import Backbone, load_backbone, new_backbone, save_backbone
from minwm.models.checkpoints import save_model
from minwm.models.conversion import convert, export_diffusers
from minwm.models.presets import preset
from minwm.models.verification import TOLERANCE, compare, load_diffusers, verify

pytestmark = pytest.mark.parity

NewBackbone = Callable[..., Backbone]
GIB = 2**30

OURS: dict[str, dict[str, Any]] = {
    "wan": {"dim": 48, "ffn_dim": 64, "byte_text": False},
    # Diffusers embeds the text at the frames' timestep, has 256 frequencies and a byT5 projection of 2048 built in
    "hunyuan": {
        "mlp_dim": 128,
        "frequencies": 256,
        "refiner_layers": 2,
        "text_dim": 8,
        "text_length": 9,
        "glyph_dim": 12,
        "glyph_hidden": 2048,
        "glyph_length": 9,
        "vision_dim": 10,
        "vision_length": 9,
        "text_timestep": "frames",
    },
}


@pytest.fixture(params=["wan", "hunyuan"])
def ours(request: pytest.FixtureRequest, new_backbone: NewBackbone) -> Backbone:
    """A small backbone with random weights."""
    backbone = new_backbone(kind=request.param, conditions=(), **OURS[request.param])
    randomise(backbone.model)
    return backbone


def randomise(model: nn.Module) -> None:
    """About as large as trained weights are: Diffusers' float32 timestep sinusoid is off by up to 4e-5 at 1000."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5, generator=random)
            else:
                parameter.copy_(float("norm" in name and "weight" in name))
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)


def assert_same_output(ours: Backbone, theirs: nn.Module) -> None:
    for seed in range(3):
        found = compare(ours, theirs, seed=seed)
        assert found.deviation > 0.1, "there is something to compare"
        assert found.largest_difference < TOLERANCE


def test_our_weights_in_diffusers_class_give_our_output(ours: Backbone, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", ours.model, kind="backbone", config=ours.config, dtype=torch.float32)
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    assert_same_output(ours, load_diffusers(tmp_path / "theirs", ours.config))


def test_diffusers_weights_in_our_class_give_their_output(ours: Backbone, tmp_path: Path) -> None:
    """Weights that Diffusers made and saved, not ours in disguise."""
    save_backbone(tmp_path / "form", ours, {})
    export_diffusers(tmp_path / "form", tmp_path / "theirs")
    theirs = load_diffusers(tmp_path / "theirs", ours.config)
    theirs = type(theirs).from_config(theirs.config).eval()  # type: ignore[attr-defined]
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "saved")
    convert(str(tmp_path / "saved"), ours.config, tmp_path / "ours")
    assert_same_output(load_backbone(tmp_path / "ours"), theirs)
    assert verify(str(tmp_path / "saved"), ours.config).agrees


def test_there_and_back_again_every_bit_is_the_same(ours: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path / "ours", ours, {})
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), ours.config, tmp_path / "again")
    first, again = (load_backbone(tmp_path / name).model.state_dict() for name in ("ours", "again"))
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "gibibytes"), [("wan2.1-t2v-1.3b", 16), ("hunyuanvideo-1.5-8b", 80)])
def test_a_whole_model_gives_diffusers_output(name: str, gibibytes: int, tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if memory < gibibytes:
        pytest.skip(f"{name} twice in float32 needs {gibibytes} GiB, this machine has {memory:.0f}")
    backbone = new_backbone(name, seed=0)
    save_model(tmp_path / "ours", backbone.model, kind="backbone", config=preset(name), dtype=torch.float32)
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    found = compare(backbone, load_diffusers(tmp_path / "theirs", preset(name)))
    assert found.agrees, found
