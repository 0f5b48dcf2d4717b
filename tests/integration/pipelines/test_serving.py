"""The session service as the demo starts it."""

import json
from pathlib import Path

import pytest

from minwm.errors import SessionError
from minwm_pipelines.demo import LATENCY, VIDEO, play_world
from minwm_pipelines.serving import served

pytestmark = pytest.mark.integration


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    expected = r"ended while starting: .*not a world model \(it has no world\.json\)"
    with pytest.raises(SessionError, match=expected), served(tmp_path, tmp_path / "service.log"):
        pass


@pytest.mark.slow
def test_a_world_that_is_there_is_served_and_played(tiny_world: Path, tmp_path: Path) -> None:
    """What `make play` does."""
    play_world(tmp_path / "play", tiny_world, "w*2,l*1")
    assert json.loads((tmp_path / "play" / LATENCY).read_text())["chunks"] == 3
    assert (tmp_path / "play" / VIDEO).stat().st_size > 1000
