"""The demo's care for what is not its own."""

from pathlib import Path

import pytest

from minwm.errors import ConfigError
from minwm.geometry.trajectory import parse
from minwm_pipelines.demo import MARKER, TRAJECTORY, _start_over

pytestmark = pytest.mark.unit


def test_an_earlier_demos_results_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "runs/demo"
    _start_over(out)
    (out / "session.mp4").write_bytes(b"old")
    _start_over(out)
    assert [path.name for path in out.iterdir()] == [MARKER]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        _start_over(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_trajectory_goes_forward_turns_and_strafes() -> None:
    held = set().union(*(step.keys for step in parse(TRAJECTORY)))
    assert {"w", "a", "d", "j", "l"} <= held
