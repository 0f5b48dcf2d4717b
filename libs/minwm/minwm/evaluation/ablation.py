"""Ablations: what a choice in a recipe does to camera control, from several seeds of each of its arms.

title: Wrong camera poses
start: start.yaml        # a recipe, trained once for all arms and all ablations of a folder; beside this file
recipe: control.yaml     # what every arm trains, from the start's model
arms:                    # by name, what `minwm train --set` would take; others are compared with the first
  exact poses: []
  noisy poses: [method.window.pose_noise.rotation_degrees=5]
steps: [50, 100]         # after which control is measured
seeds: [0, 1, 2]
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minwm.config import build, load_yaml
from minwm.data.clips import load_clips
from minwm.errors import ConfigError
from minwm.evaluation.control import ControlMargin, control_margin
from minwm.evaluation.evaluate import Bars, write_json
from minwm.models.backbones import load_backbone
from minwm.training.recipe import Recipe, load_recipe, run_recipe

FEWEST_SEEDS = 3
# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Curves = dict[str, dict[int, dict[int, ControlMargin]]]
"""Margins by arm, seed and steps."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One question. `clips`: held-out clips that control is measured on, at most; `frames`: of their windows."""

    title: str
    start: str
    recipe: str
    arms: dict[str, tuple[str, ...]]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    clips: int = 40
    frames: int = 8

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigError("arms: there are none, expected at least one")
        for name, numbers in (("steps", self.steps), ("seeds", self.seeds)):
            if not numbers or list(numbers) != sorted(set(numbers)):
                raise ConfigError(f"{name}={list(numbers)}: expected different numbers, in rising order")
        if len(self.seeds) > len(_STUDENT) + 1:
            raise ConfigError(f"seeds: are {len(self.seeds)}, expected at most {len(_STUDENT) + 1}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The margin's difference between two conditions that share their seeds: its mean ± a 95 % interval's half.

    Seeds are few, so the interval is Student's, on the differences within seeds; None for a single seed.
    """

    what: str
    difference: float
    interval: float | None
    seeds: int

    @property
    def conclusive(self) -> bool:
        """Whether there are three seeds or more and the interval leaves out zero."""
        return self.interval is not None and self.seeds >= FEWEST_SEEDS and abs(self.difference) > self.interval

    def verdict(self) -> str:
        """The result in plain language."""
        spread = "one seed" if self.interval is None else f"± {self.interval:.1%}, 95 %, {self.seeds} seeds"
        figures = f"{self.what}: {self.difference:+.1%} of margin ({spread})"
        return f"{figures}: {'a difference' if self.conclusive else 'inconclusive'}"


def load_ablation(path: Path) -> Ablation:
    """Read one. Raises ConfigError for whatever is wrong in it."""
    return build(Ablation, load_yaml(path))


def run_ablation(path: Path, out: Path, overrides: Sequence[str], bars: Bars) -> dict[str, Any]:
    """Train every arm with every seed under `out`, and write `out/NAME.json`: what was asked, curves, comparisons.

    `overrides` are for all recipes, the start's included. What was interrupted goes on, and what is known is not
    measured again.
    """
    ablation = load_ablation(path)
    asked = {**json.loads(json.dumps(asdict(ablation))), "overrides": list(overrides)}
    start = _start(path.parent / ablation.start, out / "start", overrides, bars)
    runs, file = out / path.stem, out / f"{path.stem}.json"
    curves: Curves = {}
    total = len(ablation.arms) * len(ablation.seeds) * len(ablation.steps)
    with bars(ablation.title, total) as report:
        for done, (arm, seed, steps) in enumerate(_points(ablation)):
            margins = curves.setdefault(arm, {}).setdefault(seed, {})
            own = [*overrides, *ablation.arms[arm], f"backbone={start}", f"run.seed={seed}", f"run.steps={steps}"]
            recipe = load_recipe(path.parent / ablation.recipe, own)
            margins[steps] = _measured(recipe, ablation, runs / f"{_slug(arm)}-{seed}")
            report(done + 1, f"{arm}, seed {seed}, {steps} steps: {margins[steps].margin:+.1%}")
    found = {
        arm: {seed: {steps: asdict(margin) for steps, margin in margins.items()} for seed, margins in seeds.items()}
        for arm, seeds in curves.items()
    }
    compared = [{**asdict(one), "verdict": one.verdict()} for one in comparisons(ablation, curves)]
    result = {"asked": asked, "curves": found, "comparisons": compared}
    write_json(file, result)
    return result


def comparisons(ablation: Ablation, curves: Curves) -> list[Comparison]:
    """Every arm with the first, after all steps; and every arm with itself, between the last two measurements."""

    def margins(arm: str, steps: int) -> list[float]:
        return [curves[arm][seed][steps].margin for seed in ablation.seeds]

    first, *others = ablation.arms
    last = ablation.steps[-1]
    found = [compare(f"{arm} over {first}", margins(arm, last), margins(first, last)) for arm in others]
    if len(ablation.steps) > 1:
        before = ablation.steps[-2]
        growth = f"{last} steps over {before}"
        found += [compare(f"{arm}, {growth}", margins(arm, last), margins(arm, before)) for arm in ablation.arms]
    return found


def compare(what: str, these: Sequence[float], those: Sequence[float]) -> Comparison:
    """Two conditions, seed by seed."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    count = len(differences)
    interval = None
    if count > 1:
        interval = _STUDENT[count - 2] * statistics.stdev(differences) / count**0.5
    return Comparison(what=what, difference=statistics.mean(differences), interval=interval, seeds=count)


def _points(ablation: Ablation) -> list[tuple[str, int, int]]:
    """What is measured, in turn: seeds outermost, so that an interrupted ablation has whole ones."""
    return [(arm, seed, steps) for seed in ablation.seeds for arm in ablation.arms for steps in ablation.steps]


def _start(path: Path, folder: Path, overrides: Sequence[str], bars: Bars) -> Path:
    """The model that all arms start from."""
    recipe = load_recipe(path, overrides)
    with bars("start", recipe.run.steps) as report:
        return run_recipe(recipe, folder, lambda done, total, figures: report(done))


def _measured(recipe: Recipe, ablation: Ablation, folder: Path) -> ControlMargin:
    """The control of a run's model after the recipe's steps, trained to there if it is not yet known."""
    for optimizer in recipe.optimizers.values():
        if optimizer.decay_to != 1:
            raise ConfigError(f"decay_to={optimizer.decay_to}: expected 1, rates must not depend on a run's length")
    file = folder / f"control-{recipe.run.steps}.json"
    made_with = json.loads(json.dumps({"recipe": asdict(recipe), "clips": ablation.clips}, default=str))
    if not file.exists():
        model = load_backbone(run_recipe(recipe, folder))
        heldout, _ = load_clips(recipe.data, "heldout")
        clips = heldout[:: max(1, len(heldout) // ablation.clips)][: ablation.clips]
        write_json(file, {**made_with, "control": asdict(control_margin(model, clips, frames=ablation.frames))})
    known = json.loads(file.read_text())
    if any(known[name] != value for name, value in made_with.items()):
        raise ConfigError(f"{file}: was made with another recipe, expected a fresh --out")
    return build(ControlMargin, known["control"])


def _slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in arm)
