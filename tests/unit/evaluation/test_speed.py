import pytest

from minwm.errors import ConfigError
from minwm.evaluation.speed import SpeedConfig, measure_speed
from minwm.models.worlds import World

pytestmark = pytest.mark.unit


def test_every_way_is_timed_and_the_headline_is_the_ratio_of_first_frames(world: World) -> None:
    rounds: list[int] = []
    config = SpeedConfig(rounds=2, bidirectional_steps=24, bidirectional_frames=8, teacher_steps=12)
    speed = measure_speed(world, config, progress=rounds.append)
    ways = {way["name"]: way for way in speed["ways"]}
    assert [(name, way["steps"]) for name, way in ways.items()] == [
        ("bidirectional", 24),
        ("teacher", 12),
        ("student_2", 2),  # the world's own number; four are not offered
        ("student_1", 1),
    ]
    assert rounds == [1, 2]
    ratio = ways["bidirectional"]["first_frame_seconds"] / ways["student_2"]["first_frame_seconds"]
    assert speed["bidirectional_over_ours"] == pytest.approx(ratio)
    assert ratio > 2, "24 steps over 8 latent frames take longer than 2 over 2"
    assert ways["teacher"]["first_frame_seconds"] > ways["student_1"]["first_frame_seconds"]
    assert ways["student_1"]["frames_per_second"] > ways["teacher"]["frames_per_second"] > 0
    assert (speed["size"], speed["bidirectional_frames"]) == ([32, 48], 32)


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        SpeedConfig(rounds=0)
