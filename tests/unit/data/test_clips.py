"""Clips: checked when made, the same after a trip through shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minwm.data.clips import KIND, Clip, ClipReader, clip_statistics, load_clips
from minwm.data.shards import ShardReader, ShardWriter
from minwm.errors import DataError

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]


@pytest.fixture
def clip(new_clips: NewClips) -> Clip:
    return new_clips(1, 5)[0]


def test_clips_come_back_bit_for_bit_by_split(new_clips: NewClips, tmp_path: Path) -> None:
    clips = new_clips(3, 5)
    clips[1] = dataclasses.replace(clips[1], split="heldout", notes={"pose_error": 0.5})
    with ShardWriter(tmp_path / "d", KIND) as writer:
        for clip in clips:
            writer.add(clip.name, clip.to_files())
    loaded, manifest = load_clips(tmp_path / "d")
    assert manifest.samples == 3
    for one, other in zip(loaded, clips, strict=True):
        for field in dataclasses.fields(Clip):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)
    assert [clip.name for clip in load_clips(tmp_path / "d", "train")[0]] == ["clip-0", "clip-2"]
    assert [clip.name for clip in load_clips(tmp_path / "d", "heldout")[0]] == ["clip-1"]


def test_clips_are_read_by_number_with_or_without_their_video(new_clips: NewClips, tmp_path: Path) -> None:
    clips = new_clips(4, 5)
    clips[1] = dataclasses.replace(clips[1], split="heldout")
    with ShardWriter(tmp_path / "d", KIND, shard_bytes=1) as writer:  # a clip a shard
        for clip in clips:
            writer.add(clip.name, clip.to_files())
    shards = ShardReader(tmp_path / "d", KIND)
    reader, with_video = ClipReader(shards, "train"), ClipReader(shards, "train", video=True)
    assert len(reader) == 3
    for index, clip in ((2, clips[3]), (0, clips[0]), (1, clips[2])):
        for field in dataclasses.fields(Clip):
            expected = b"" if field.name == "frames" else getattr(clip, field.name)
            np.testing.assert_array_equal(getattr(reader[index], field.name), expected, err_msg=field.name)
        assert with_video[index].frames == clip.frames
    with pytest.raises(DataError, match="clip clip-3: was read without its video"):
        reader[2].video()
    with pytest.raises(IndexError):
        reader[3]


def test_a_damaged_clip_is_named_with_its_shard(clip: Clip, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d", KIND) as writer:
        writer.add("c1", {**clip.to_files(), "poses.npy": b"nothing"})
    with pytest.raises(DataError, match=r"shard-00000\.tar: clip c1: cannot be read"):
        ClipReader(ShardReader(tmp_path / "d", KIND), "train")[0]


def test_a_clip_that_names_no_split_is_refused(clip: Clip, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d", KIND) as writer:
        writer.add("c1", {**clip.to_files(), "json": b"{}"})
    with pytest.raises(DataError, match=r"shard-00000\.tar: clip c1: names no split"):
        ClipReader(ShardReader(tmp_path / "d", KIND), "train")


def test_a_split_without_clips_is_refused(clip: Clip, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d", KIND) as writer:
        writer.add(clip.name, clip.to_files())
    with pytest.raises(DataError, match="has no clips in split 'heldout', 1 in all"):
        load_clips(tmp_path / "d", "heldout")
    with pytest.raises(DataError, match="has no clips in split 'heldout', 1 in all"):
        ClipReader(ShardReader(tmp_path / "d", KIND), "heldout")


def test_a_clip_decodes_its_own_frames(clip: Clip) -> None:
    assert clip.video().shape == (20, 32, 48, 3)
    cut = dataclasses.replace(clip, frames=clip.frames[: len(clip.frames) // 2])
    with pytest.raises(DataError, match="clip clip-0: the video"):
        cut.video()


def test_a_pose_that_is_not_a_number_is_refused(clip: Clip) -> None:
    poses = clip.poses.copy()
    poses[2, 1, 1] = np.nan
    with pytest.raises(DataError, match="clip clip-0: a pose is not finite"):
        dataclasses.replace(clip, poses=poses)


def test_an_empty_clip_is_refused(clip: Clip) -> None:
    with pytest.raises(DataError, match="clip clip-0: is empty"):
        dataclasses.replace(clip, latents=clip.latents[:0], poses=clip.poses[:0], actions=clip.actions[:0])


def test_tracks_of_another_length_are_refused(clip: Clip) -> None:
    with pytest.raises(DataError, match="clip clip-0: 4 poses and 5 actions for 5 latent frames"):
        dataclasses.replace(clip, poses=clip.poses[:4])


@pytest.mark.parametrize("lost", ["latents.npy", "poses.npy", "intrinsics.npy", "actions.npy", "mp4", "json"])
def test_a_missing_file_is_named(clip: Clip, lost: str) -> None:
    files = clip.to_files()
    del files[lost]
    with pytest.raises(DataError, match=f"clip c1: lacks the file {lost}"):
        Clip.from_files("c1", files)


@pytest.mark.parametrize("name", ["latents.npy", "poses.npy", "json"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_file_is_refused(clip: Clip, name: str, keep: float) -> None:
    files = clip.to_files()
    files[name] = files[name][: int(keep * len(files[name]))]
    with pytest.raises(DataError, match="clip c1: "):
        Clip.from_files("c1", files)


def test_statistics_count_clips_frames_and_actions(new_clips: NewClips) -> None:
    clips = [dataclasses.replace(clip, actions=np.array([0, 9, 9])) for clip in new_clips(3, 3)]
    clips[0] = dataclasses.replace(clips[0], split="heldout")
    assert clip_statistics(clips) == {
        "clips": {"train": 2, "heldout": 1},
        "latent_frames": 9,
        "actions": {"0": 3, "9": 6},
    }
