import json
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from numpy.typing import NDArray
from typer.testing import CliRunner

from minwm.errors import ConfigError
from minwm.evaluation.commands import register

pytestmark = pytest.mark.unit


def _run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


def test_the_command_writes_pictures_a_page_and_the_gates_figures(
    world_folder: Path, dataset: Path, judge_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "tiny.v2"
    result = _run(world_folder, "--data", dataset, "--out", out, "--judge", judge_folder, "--clips", "2")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.parent.iterdir()) == ["tiny.v2", "tiny.v2.html", "tiny.v2.json"]
    figures = json.loads((tmp_path / "runs" / "tiny.v2.json").read_text())
    assert figures == json.loads((out / "eval.json").read_text())["figures"]
    assert figures["turn_direction"]["clips"] == figures["psnr_1s_repeat_last"]["clips"] == 2
    assert "turn_direction" in result.output and "needs long walks" in result.output


def test_another_feature_extractor_takes_the_judges_place(world_folder: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    arguments = (world_folder, "--data", dataset, "--out", out, "--clips", "2")
    result = _run(*arguments, "--features", f"{__name__}:new_brightness")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["perceptual_1s"]["value"] > 0 and figures["turn_direction"]["value"] is None
    for wrong in ("nowhere:brightness", f"{__name__}:missing", "nothing"):
        error = _run(*arguments, "--features", wrong).exception
        assert isinstance(error, ConfigError) and "expected module:function" in str(error), wrong


def test_a_size_that_cannot_be_read_is_refused(world_folder: Path, tmp_path: Path) -> None:
    error = _run(world_folder, "--data", tmp_path / "d", "--out", tmp_path / "o", "--record", "--size", "big").exception
    assert isinstance(error, ConfigError) and "--size big" in str(error)


class _Brightness:
    """A FeatureExtractor that sees only how light frames are."""

    def clip_features(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.asarray(frames.mean((1, 2, 3))[:2])

    def frame_features(self, frames: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        return [frames.mean((1, 2, 3), keepdims=True).astype(np.float32)]

    def perceptual(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.abs(a.mean((1, 2, 3)) - b.mean((1, 2, 3)))


def new_brightness() -> _Brightness:
    """What --features names."""
    return _Brightness()
