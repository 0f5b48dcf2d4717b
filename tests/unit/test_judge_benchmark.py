"""The benchmark of the judge counts what the judge says of the clips that it was told to look at."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

from minwm.data.episode import Episode, write_episodes
from minwm.evaluation.judge import Judge, JudgeConfig, estimator_error, load_judge, save_judge
from minwm.models.autoencoder import Autoencoder
from minwm.models.checkpoints import save_autoencoder

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).parents[2] / "benchmarks/judge.py"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """`benchmarks/judge.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_judge", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_figures_are_those_of_held_out_clips(
    benchmark: ModuleType,
    new_episodes: Callable[[int, int], list[Episode]],
    tiny_autoencoder: Autoencoder,
    tmp_path: Path,
) -> None:
    episodes = new_episodes(4, 20)
    episodes[1].labels[4] = ["GreenTorch", "Lamp"]  # the end of its first clip's only window
    write_episodes(episodes, tmp_path / "data", {})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_judge(tmp_path / "judge", Judge(JudgeConfig(labels=("Clip", "GreenTorch"), scenes=("maze:E1M1",))))
    save_autoencoder(tmp_path / "autoencoder", tiny_autoencoder)
    app = typer.Typer()
    app.command()(benchmark.main)
    common = [f"--data={tmp_path / 'data'}", f"--judge={tmp_path / 'judge'}", "--heldout-every=2", "--clip-frames=8"]
    found = []
    for through in ([], [f"--through={tmp_path / 'autoencoder'}"]):
        command = [*common, *through, f"--out={tmp_path / 'figures.json'}"]
        CliRunner().invoke(app, command, catch_exceptions=False)
        found.append(json.loads((tmp_path / "figures.json").read_text()))
    figures, soft = found
    clips = [(e.frames[s : s + 8], e.poses[s + 3 : s + 8 : 4]) for e in episodes[1::2] for s in (0, 8)]
    expected = estimator_error(load_judge(tmp_path / "judge"), clips)
    assert (figures["clips"], figures["motions"], figures["windows"]) == (4, 4, 4)
    assert figures["rotation_error_deg"] == pytest.approx(expected.rotation_error_deg)
    assert figures["translation_error"] == pytest.approx(expected.translation_error)
    assert figures["scene_accuracy"] == 1 and figures["label_precision"].keys() == {"GreenTorch"}
    assert figures["label_map_by_chance"] == 1 / 4
    assert figures["mean_error"]["yaw"] == pytest.approx(figures["rotation_error_deg"])
    assert soft["rotation_error_deg"] != figures["rotation_error_deg"], "the reconstruction is another picture"
