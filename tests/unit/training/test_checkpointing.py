"""Checkpoints: whole or not there, few, and passed over when damaged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.errors import TrainingError
from minwm.training.checkpointing import Best, Checkpoints, flat

pytestmark = pytest.mark.unit

MADE_WITH = {"run.seed": 1, "optimizers.net.betas": [0.9, 0.99]}


def state(step: int) -> dict[str, Any]:
    return {"networks": {"net": {"weight": torch.full((3,), float(step))}}, "engines": {"net": {"step": step}}}


def saved(folder: Path, *steps: int, keep: int = 2, best: Best | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state(step), MADE_WITH, best)
    return checkpoints


def test_the_newest_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    best = Best(step=200, loss=0.25)
    found = saved(tmp_path, 200, 400, best=best).newest()
    assert found is not None
    assert (found.step, found.made_with, found.best) == (400, MADE_WITH, best)
    assert torch.equal(found.state["networks"]["net"]["weight"], torch.full((3,), 400.0))
    assert found.state["engines"] == {"net": {"step": 400}}
    found.require(MADE_WITH)


def test_where_none_was_made_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 2).newest() is None


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, keep=2)
    assert checkpoints.steps() == [1, 2]
    for step in (3, 4, 5):
        checkpoints.save(step, state(step), MADE_WITH, Best(step=2, loss=0.1))
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.save(6, state(6), MADE_WITH, Best(step=6, loss=0.05))
    assert checkpoints.steps() == [5, 6]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def damage(folder: Path, how: str) -> None:
    path = folder / ("state.pt" if how in ("flip", "truncate", "remove") else "about.json")
    if how.startswith("remove"):
        path.unlink()
    elif how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "truncate about", "remove about"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    checkpoints = saved(tmp_path, 200, 400)
    damage(tmp_path / "checkpoints/step-000400", how)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest()
    assert found is not None and found.step == 200
    (warning,) = caplog.messages
    assert "step-000400: damaged" in warning
    checkpoints.save(300, state(300), MADE_WITH, None)
    checkpoints.save(400, state(400), MADE_WITH, None)  # the run comes there again
    found = checkpoints.newest()
    assert found is not None and found.step == 400


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 200, 400)
    for step in (200, 400):
        damage(tmp_path / f"checkpoints/step-{step:06d}", "flip")
    with pytest.raises(TrainingError, match=r"all checkpoints are damaged, \[200, 400\]"):
        checkpoints.newest()


def test_what_an_interrupted_write_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    partial = tmp_path / "checkpoints/.step-000002.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    found = checkpoints.newest()
    assert found is not None and found.step == 1
    checkpoints.save(2, state(2), MADE_WITH, None)
    assert not partial.exists() and checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        ({**MADE_WITH, "run.seed": 2}, "run.seed=1 where this run has 2"),
        ({"run.seed": 1}, r"optimizers.net.betas=\[0.9, 0.99\] where this run has None"),
        ({**MADE_WITH, "method.new": "x"}, "method.new=None where this run has 'x'"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, now: dict[str, Any], complaint: str) -> None:
    found = saved(tmp_path, 1).newest()
    assert found is not None
    with pytest.raises(TrainingError, match=f"step-000001: was made with {complaint}; use another folder"):
        found.require(now)


values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers(), max_size=3)
names = st.text("abc", min_size=1, max_size=3)


@given(st.dictionaries(names, values | st.dictionaries(names, values, max_size=3), max_size=4))
def test_nested_settings_are_compared_by_dotted_names_as_json_gives_them_back(settings: dict[str, Any]) -> None:
    dotted = flat(settings)
    assert json.loads(json.dumps(dotted)) == dotted
    for name, value in dotted.items():
        found: Any = settings
        for part in name.split("."):
            found = found[part]
        assert found == value
