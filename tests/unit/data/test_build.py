"""Episodes to clips: one stream encoded, cut, labelled, filtered and counted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.data.build import ClipsConfig, build_clips, encode_stream
from minwm.data.clips import load_clips
from minwm.data.episode import Episode
from minwm.data.shards import MANIFEST
from minwm.errors import ConfigError, DataError
from minwm.geometry.actions import from_poses
from minwm.models.autoencoder import Autoencoder

pytestmark = pytest.mark.unit

NewEpisodes = Callable[[int, int], list[Episode]]
CONFIG = ClipsConfig(clip_frames=4, heldout_every=2)


def test_an_episode_is_encoded_as_one_stream(new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder) -> None:
    (episode,) = new_episodes(1, 150)  # more than a piece, and no whole number of latent frames
    latents = encode_stream(tiny_autoencoder, episode.frames)
    pixels = torch.from_numpy(episode.frames).permute(0, 3, 1, 2)[None] / 255
    expected = tiny_autoencoder.encode(pixels)[0][0].numpy()
    assert latents.shape == (37, 4, 4, 6)
    assert latents.dtype == np.float16
    np.testing.assert_allclose(latents, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("scene", "labels", "caption"),
    [
        ("freedoom1:E1M3", [], "freedoom1 e1m3"),
        ("freedoom1:E1M3", ["ShortRedTorch"], "freedoom1 e1m3: short red torch"),
        (
            "freedoom1:E1M3",
            ["ShortRedTorch", "ShortGreenColumn", "TallRedColumn"],
            "freedoom1 e1m3: short red torch, short green column",
        ),
        (f"{'x' * 70}:E1M1", ["Shell"], "x" * 64),
    ],
)
def test_a_caption_names_as_many_objects_as_presets_that_embed_bytes_can_take(
    new_episodes: NewEpisodes,
    tiny_autoencoder: Autoencoder,
    tmp_path: Path,
    scene: str,
    labels: list[str],
    caption: str,
) -> None:
    (episode,) = new_episodes(1, 42)
    seen = [labels[: 1 + number % max(1, len(labels))] for number in range(42)]  # the first most often
    build_clips([dataclasses.replace(episode, scene=scene, labels=seen)], tiny_autoencoder, tmp_path / "d", CONFIG)
    clips, _ = load_clips(tmp_path / "d")
    assert {clip.caption for clip in clips} == {caption}


def test_clips_are_cuts_of_the_stream_with_everything_that_belongs_to_them(
    new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder, tmp_path: Path
) -> None:
    episodes, done = new_episodes(3, 42), list[int]()  # 10 latent frames each: two clips and a rest
    manifest = build_clips(episodes, tiny_autoencoder, tmp_path / "d", CONFIG, done.append)
    assert done == [1, 2, 3]
    clips, _ = load_clips(tmp_path / "d")
    assert [clip.name for clip in clips] == [f"episode-{e}-{n:03d}" for e in range(3) for n in range(2)]
    assert [clip.split for clip in clips] == ["train", "train", "heldout", "heldout", "train", "train"]
    for number, clip in enumerate(clips):
        episode, start = episodes[number // 2], number % 2 * 4
        latents = encode_stream(tiny_autoencoder, episode.frames)
        np.testing.assert_array_equal(clip.latents, latents[start : start + 4])
        last_of_four = [4 * (start + f) + 3 for f in range(4)]
        np.testing.assert_array_equal(clip.poses, episode.poses[last_of_four])
        np.testing.assert_array_equal(clip.actions, from_poses(clip.poses))
        np.testing.assert_array_equal(clip.intrinsics, episode.intrinsics)
        assert clip.episode == episode.name
        assert clip.caption == "maze e1m1: green torch"
        nearest = [np.abs(episode.frames - shown.astype(int)).mean((1, 2, 3)).argmin() for shown in clip.video()]
        assert nearest == list(range(4 * start, 4 * start + 16))
        assert clip.notes["annotators"] == manifest.about["annotators"]
    about = manifest.about
    assert (about["size"], about["fps"], about["dropped"]) == ([32, 48], 17.5, 0)
    assert about["clips"] == {"train": 4, "heldout": 2}
    assert about["latent_frames"] == 24


def test_speeds_are_the_medians_of_free_motion(
    new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder, tmp_path: Path
) -> None:
    episodes = new_episodes(3, 16)
    manifest = build_clips(episodes, tiny_autoencoder, tmp_path / "d", CONFIG)
    moves, turns = zip(*((e.commands[0, 1], e.commands[0, 2]) for e in episodes), strict=True)
    assert manifest.about["speeds"]["move"] == pytest.approx(float(np.median(moves)), rel=0.01)
    assert manifest.about["speeds"]["turn"] == pytest.approx(float(np.median(turns)), rel=0.01)


def blocked(episode: Episode, frames: slice) -> Episode:
    """The same, but held by a wall in some frames: commanded to walk, and staying where it is."""
    poses = episode.poses.copy()
    poses[frames, :3, 3] = poses[frames.start, :3, 3]
    return dataclasses.replace(episode, poses=poses)


def test_clips_whose_motion_contradicts_the_command_are_dropped(
    new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder, tmp_path: Path
) -> None:
    free, other = new_episodes(2, 32)
    held = blocked(other, slice(4, 14))  # two and a half of the first clip's four latent frames, none of the second's
    manifest = build_clips([free, held], tiny_autoencoder, tmp_path / "d", CONFIG)
    assert [clip.name for clip in load_clips(tmp_path / "d")[0]] == ["episode-0-000", "episode-0-001", "episode-1-001"]
    assert manifest.about["dropped"] == 1
    lenient = dataclasses.replace(CONFIG, max_blocked=1.0)
    assert build_clips([free, held], tiny_autoencoder, tmp_path / "e", lenient).samples == 4


def test_a_dataset_of_which_nothing_is_left_is_refused(
    new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder, tmp_path: Path
) -> None:
    held = [blocked(episode, slice(0, 16)) for episode in new_episodes(2, 16)]
    with pytest.raises(DataError, match="every clip was filtered out or the source is empty"):
        build_clips(held, tiny_autoencoder, tmp_path / "d", CONFIG)
    with pytest.raises(DataError, match="every clip was filtered out or the source is empty"):
        build_clips([], tiny_autoencoder, tmp_path / "e", CONFIG)
    assert not (tmp_path / "d" / MANIFEST).exists()


def test_an_episode_shorter_than_a_clip_is_named(
    new_episodes: NewEpisodes, tiny_autoencoder: Autoencoder, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="episode episode-0: has 3 latent frames, one clip needs 4"):
        build_clips(new_episodes(1, 15), tiny_autoencoder, tmp_path / "d", CONFIG)
    assert not (tmp_path / "d" / MANIFEST).exists()


@pytest.mark.parametrize("wrong", [{"clip_frames": 0}, {"heldout_every": 0}])
def test_impossible_cuts_are_refused(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        ClipsConfig(**wrong)  # type: ignore[arg-type]
