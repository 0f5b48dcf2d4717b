"""`minwm checkpoints …` as a user types it."""

from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from minwm.errors import CheckpointError, ConfigError, MinwmError
from minwm.models import presets
from minwm.models.backbones import load_backbone, new_model
from minwm.models.commands import register
from minwm.models.context import History
from minwm.models.presets import WorldConfig
from minwm.models.wan import WanConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights in `official/`, which fit the preset `tiny` and, with branches added, `tiny-camera`."""
    sizes = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "channels": 4, "text_dim": 8, "text_length": 12}
    known = {"tiny": WanConfig(**sizes), "tiny-camera": WanConfig(**sizes, conditions=("camera_prope",))}
    for name, architecture in known.items():
        config = WorldConfig(
            preset=name, architecture=architecture, history=History(chunk=2, window=4), shift=5.0, levels={1: (1.0,)}
        )
        monkeypatch.setitem(presets._PRESETS, name, config)
    torch.manual_seed(0)
    weights = {name: torch.randn(value.shape) for name, value in new_model(known["tiny"]).state_dict().items()}
    (tmp_path / "official").mkdir()
    save_file(weights, tmp_path / "official" / "diffusion_pytorch_model.safetensors")
    return weights


def run(*arguments: str | Path) -> str:
    """What the command printed; its errors are raised."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])
    if isinstance(result.exception, MinwmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_prints_what_a_checkpoint_is(published: dict[str, Tensor], tmp_path: Path) -> None:
    report = yaml.safe_load(run("inspect", tmp_path / "official"))
    assert report["format"] == "Wan 2.1"
    assert report["tensors"] == len(published)
    assert report["presets"]["tiny"] == "fits"
    assert report["presets"]["hy-worldplay-8b"] == "is another backbone (hunyuan)"
    assert len(report["files"][0]["sha256"]) == 64


def test_convert_there_and_back(published: dict[str, Tensor], tmp_path: Path) -> None:
    output = run("convert", tmp_path / "official", "--preset", "tiny", "--out", tmp_path / "ours")
    assert output.strip() == f"tiny in {tmp_path / 'ours'}"
    assert torch.equal(
        load_backbone(tmp_path / "ours").model.state_dict()["head.modulation"], published["head.modulation"]
    )

    output = run("convert", tmp_path / "ours", "--to", "diffusers", "--out", tmp_path / "theirs", "--dtype", "float16")
    assert output.strip() == f"Diffusers' layout in {tmp_path / 'theirs'}"
    theirs = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(theirs["scale_shift_table"], published["head.modulation"].half())


def test_convert_adds_conditions_and_casts_when_told_to(published: dict[str, Tensor], tmp_path: Path) -> None:
    arguments = ("convert", tmp_path / "official", "--preset", "tiny-camera", "--out", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="--add-conditions"):
        run(*arguments)
    output = run(*arguments, "--add-conditions", "--dtype", "bfloat16")
    assert output.strip() == f"tiny-camera in {tmp_path / 'ours'}, 4 tensors of new branches added"
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert weights.keys() - published.keys() == {
        f"blocks.{block}.self_attn.prope_o.{kind}" for block in (0, 1) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--preset, --to: expected one of them"),
        (("--preset", "tiny", "--to", "diffusers"), "--preset, --to: expected one of them"),
        (("--to", "diffusers", "--add-conditions"), "expected neither --add-conditions nor --download"),
        (("--preset", "tinny"), "preset 'tinny': unknown, expected one of wan-doom"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    published: dict[str, Tensor], tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run("convert", tmp_path / "official", "--out", tmp_path / "ours", *options)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        run("inspect", tmp_path / "nothing")


def test_verify_runs_both_classes_on_the_weights(published: dict[str, Tensor], tmp_path: Path) -> None:
    small = {name: 0.1 * value for name, value in published.items()}  # activations of the size of trained weights'
    save_file(small, tmp_path / "official" / "diffusion_pytorch_model.safetensors")
    assert "largest difference" in run("verify", tmp_path / "official", "--preset", "tiny")
