"""Episodes: checked when made, the same after a trip through shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minwm.data.episode import KIND, Episode, EpisodeReader, iterate_episodes, write_episodes
from minwm.data.shards import ShardReader
from minwm.errors import DataError

pytestmark = pytest.mark.unit

NewEpisodes = Callable[[int, int], list[Episode]]


@pytest.fixture
def episode(new_episodes: NewEpisodes) -> Episode:
    return new_episodes(1, 10)[0]


def assert_same(one: Episode, other: Episode) -> None:
    for field in dataclasses.fields(Episode):
        mine, others = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, others, err_msg=field.name)
        else:
            assert mine == others, field.name


def test_episodes_come_back_bit_for_bit(new_episodes: NewEpisodes, tmp_path: Path) -> None:
    episodes, done = new_episodes(3, 10), list[int]()
    manifest = write_episodes(episodes, tmp_path / "d", {"source": "test"}, done.append)
    assert done == [1, 2, 3]
    assert manifest.about == {"source": "test"}
    by_number = EpisodeReader(ShardReader(tmp_path / "d", KIND))
    assert len(by_number) == 3
    for number, (one, other) in enumerate(zip(iterate_episodes(tmp_path / "d"), episodes, strict=True)):
        assert_same(one, other)
        assert_same(by_number[number], other)


def test_a_pose_that_is_not_a_number_is_named(episode: Episode) -> None:
    poses = episode.poses.copy()
    poses[6, 0, 3] = np.nan
    with pytest.raises(DataError, match="episode episode-0: the pose of frame 6 is not finite"):
        dataclasses.replace(episode, poses=poses)


def test_an_empty_episode_is_refused(episode: Episode) -> None:
    with pytest.raises(DataError, match="episode episode-0: has no frames"):
        dataclasses.replace(
            episode, frames=episode.frames[:0], poses=episode.poses[:0], commands=episode.commands[:0], labels=[]
        )


@pytest.mark.parametrize("field", ["poses", "commands", "labels"])
def test_tracks_of_another_length_than_the_frames_are_refused(episode: Episode, field: str) -> None:
    with pytest.raises(DataError, match=f"episode episode-0: {field} has 9 rows for 10 frames"):
        dataclasses.replace(episode, **{field: getattr(episode, field)[:9]})


@pytest.mark.parametrize("lost", ["frames.mkv", "track.npz"])
def test_a_missing_file_is_named(episode: Episode, lost: str) -> None:
    files = episode.to_files()
    del files[lost]
    with pytest.raises(DataError, match=f"episode e1: lacks {lost}"):
        Episode.from_files("e1", files)


@pytest.mark.parametrize("name", ["frames.mkv", "track.npz"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(episode: Episode, name: str, keep: float) -> None:
    files = episode.to_files()
    files[name] = files[name][: int(keep * len(files[name]))]
    with pytest.raises(DataError, match="episode e1: "):
        Episode.from_files("e1", files)
