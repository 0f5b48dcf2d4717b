"""Ablations: arms that differ in one choice, trained with several seeds from one start, and what is said of them."""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from minwm.cli import application
from minwm.data.clips import KIND, Clip
from minwm.data.shards import ShardWriter
from minwm.errors import ConfigError
from minwm.evaluation.ablation import compare, load_ablation, run_ablation
from minwm.models.backbones import Backbone, save_backbone
from minwm.progress import Report

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3] / "recipes/doom/ablations"
ABLATIONS = ("batch_size", "pose_noise", "steps")


@contextmanager
def silent(title: str, total: int) -> Iterator[Report]:
    yield lambda done, note="": None


@pytest.fixture
def file(tmp_path: Path, new_clips: Callable[[int, int], list[Clip]], tiny_backbone: Backbone) -> Path:
    """Two arms, two seeds, measured after one and two steps of training on six clips."""
    with ShardWriter(tmp_path / "clips", KIND) as writer:
        for number, clip in enumerate(new_clips(6, 8)):
            writer.add(clip.name, replace(clip, split="train" if number < 3 else "heldout").to_files())
    save_backbone(tmp_path / "base", tiny_backbone, {})
    recipe = {
        "stage": "autoregressive",
        "data": str(tmp_path / "clips"),
        "backbone": str(tmp_path / "base"),
        "conditions": ["camera_prope"],
        "run": {"steps": 1, "batch_size": 2, "engine": "torch", "bf16": False},
        "optimizers": {"generator": {"learning_rate": 1e-2}},
        "method": {"window": {"frames": 4}},
    }
    (tmp_path / "control.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "start.yaml").write_text(yaml.safe_dump({**recipe, "conditions": []}))
    asked = {"title": "Rates", "start": "start.yaml", "recipe": "control.yaml", "steps": [1, 2], "seeds": [0, 1]}
    arms = {"slow": [], "fast": ["optimizers.generator.learning_rate=0.1"]}
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump({**asked, "arms": arms, "frames": 4}, sort_keys=False))
    return path


def test_every_arm_is_trained_with_every_seed_and_measured_on_the_way(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    result = run_ablation(file, out, [], silent)
    curves = result["curves"]
    assert {arm: {seed: list(of) for seed, of in seeds.items()} for arm, seeds in curves.items()} == {
        arm: {0: [1, 2], 1: [1, 2]} for arm in ("slow", "fast")
    }
    margins = [curves[arm][seed][2]["margin"] for arm in curves for seed in (0, 1)]
    assert len(set(margins)) == len(margins), "arms and seeds are runs of their own"
    assert [one["what"] for one in result["comparisons"]] == [
        "fast over slow",
        "slow, 2 steps over 1",
        "fast, 2 steps over 1",
    ]
    assert json.loads((out / "rates.json").read_text()) == json.loads(json.dumps(result))


def test_what_is_known_is_not_measured_again_and_another_recipe_is_refused(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    before = run_ablation(file, out, [], silent)
    models = {path: path.stat().st_mtime_ns for path in out.glob("rates/*/model/*")}
    assert run_ablation(file, out, [], silent) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("rates/*/model/*")} == models
    file.write_text(file.read_text().replace("learning_rate=0.1", "learning_rate=0.2"))
    with pytest.raises(
        ConfigError, match=r"fast-0/control-1\.json: was made with another recipe, expected a fresh --out"
    ):
        run_ablation(file, out, [], silent)


def test_the_command_prints_the_curves_and_draws_them(file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(application(), ["ablate", str(file), "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert "Rates" in done.output
    assert "fast over slow" in done.output
    assert "inconclusive" in done.output, "two seeds conclude nothing"
    assert (tmp_path / "runs/rates.svg").read_text().lstrip().startswith("<?xml")


def test_a_rate_that_depends_on_the_length_of_the_run_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decay_to=0\.5: expected 1"):
        run_ablation(file, tmp_path / "runs", ["optimizers.generator.decay_to=0.5"], silent)


def test_three_seeds_conclude_when_their_differences_agree() -> None:
    """Differences 1, 2 and 3 hundredths: mean 0.02, deviation 0.01, t = 4.303 for two degrees of freedom."""
    one = compare("a over b", [0.11, 0.22, 0.33], [0.10, 0.20, 0.30])
    assert one.difference == pytest.approx(0.02)
    assert one.interval == pytest.approx(4.303 * statistics.stdev([0.01, 0.02, 0.03]) / 3**0.5)
    assert not one.conclusive
    assert "inconclusive" in one.verdict()
    agreed = compare("a over b", [0.12, 0.22, 0.321], [0.10, 0.20, 0.30])
    assert agreed.conclusive
    assert agreed.verdict().endswith("3 seeds): a difference")
    assert not compare("a over b", [0.3, 0.4], [0.1, 0.2]).conclusive, "two seeds"
    assert compare("a over b", [0.3], [0.1]).interval is None


@pytest.mark.parametrize("name", ABLATIONS)
def test_shipped_ablations_load_and_take_three_seeds(name: str) -> None:
    ablation = load_ablation(ROOT / f"{name}.yaml")
    assert len(ablation.seeds) >= 3
    assert {ablation.start, ablation.recipe} == {"start.yaml", "control.yaml"}
    assert (ROOT / ablation.start).is_file() and (ROOT / ablation.recipe).is_file()
