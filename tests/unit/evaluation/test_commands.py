import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from minwm.data.clips import KIND
from minwm.data.shards import ShardWriter
from minwm.data.video import decode_video
from minwm.errors import CheckpointError, ConfigError, DataError
from minwm.evaluation.commands import evaluate, register

from .conftest import MakeClip

pytestmark = pytest.mark.unit


def test_the_command_writes_figures_and_pictures_of_the_heldout_clips(
    world_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    register(app)
    out = tmp_path / "eval"
    result = CliRunner().invoke(app, [str(world_folder), "--data", str(dataset), "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "eval.json").read_text())
    assert [clip["name"] for clip in written["clips"]] == ["clip-001", "clip-002", "clip-003"]
    assert written["control"]["clips"] == 3
    assert all(np.isfinite(list(written["metrics"].values())))
    assert written["control"]["verdict"].split()[0] in result.output
    for clip in written["clips"]:
        assert len(decode_video((out / clip["video"]).read_bytes(), where=clip["name"])) == 8 + 32
        assert (out / clip["strip"]).is_file()


def test_evaluation_is_the_same_every_time(world_folder: Path, dataset: Path, tmp_path: Path) -> None:
    first, second = (evaluate(world_folder, dataset, tmp_path / name, clips=2, seed=3) for name in "ab")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert len(first["clips"]) == 2


def test_short_clips_give_short_rollouts(world_folder: Path, make_clip: MakeClip, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "short", KIND) as writer:
        for number in range(2):
            writer.add(f"c{number}", make_clip(number, latent_frames=6).to_files())
    result = evaluate(world_folder, tmp_path / "short", tmp_path / "out")
    assert len(result["psnr"]["per_frame"]["generated"]) == 16
    assert [row["seconds"] for row in result["psnr"]["at"]] == [0.5]


def test_what_cannot_be_evaluated_leaves_no_result(
    world_folder: Path, dataset: Path, make_clip: MakeClip, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(world_folder, dataset, out, clips=2)
    with pytest.raises(ConfigError, match="clips=1"):
        evaluate(world_folder, dataset, out, clips=1)
    with pytest.raises(CheckpointError, match=r"no world\.json"):
        evaluate(dataset, dataset, out)
    with ShardWriter(tmp_path / "one", KIND) as writer:
        writer.add("only", make_clip(0).to_files())
    with pytest.raises(DataError, match="at least 2"):
        evaluate(world_folder, tmp_path / "one", out)
    assert not (out / "eval.json").exists()
