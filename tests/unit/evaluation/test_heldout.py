from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minwm.data.clips import load_clips
from minwm.errors import CheckpointError, ConfigError
from minwm.evaluation.heldout import HeldoutConfig, open_world, record_heldout
from minwm.models.worlds import load_world
from minwm.progress import Report

pytestmark = pytest.mark.unit


@contextmanager
def _no_bar(title: str, total: int) -> Iterator[Report]:
    yield lambda done, note="": None


def test_a_backbone_with_its_autoencoder_is_a_world_of_the_datasets_size_and_pace(
    world_folder: Path, dataset: Path
) -> None:
    parts = world_folder.parent
    found, whole = open_world(parts / "backbone", parts / "autoencoder", dataset, 2), load_world(world_folder)
    assert (found.card.height, found.card.width, found.card.fps) == (32, 48, 17.5)
    assert found.card.speeds == whole.card.speeds and found.card.intrinsics == (0.5, 0.75, 0.5, 0.5)
    for name, weight in whole.backbone.model.state_dict().items():
        assert np.array_equal(weight.float(), found.backbone.model.state_dict()[name].float()), name
    assert open_world(world_folder, None, dataset).card == whole.card


def test_a_world_samples_in_the_steps_asked_for_if_it_offers_them(world_folder: Path, dataset: Path) -> None:
    assert open_world(world_folder, None, dataset, steps=1).card.steps == 1
    with pytest.raises(ConfigError, match="steps=3"):
        open_world(world_folder, None, dataset, steps=3)


def test_parts_that_do_not_fit_are_refused(world_folder: Path, dataset: Path) -> None:
    parts = world_folder.parent
    with pytest.raises(ConfigError, match="steps=4: tiny samples in one of"):
        open_world(parts / "backbone", parts / "autoencoder", dataset)
    with pytest.raises(CheckpointError, match="needs --autoencoder"):
        open_world(parts / "backbone", None, dataset)
    with pytest.raises(ConfigError, match="has its own"):
        open_world(world_folder, parts / "autoencoder", dataset)


def test_play_is_recorded_once_and_all_of_it_is_held_out(world_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vizdoom", exc_type=ImportError)
    config = HeldoutConfig(scenes=("freedoom1:E1M3",), episode_frames=64, clip_frames=4)
    folder = record_heldout(tmp_path / "play", world_folder, None, config, _no_bar)
    clips, _ = load_clips(folder)
    assert clips and {clip.split for clip in clips} == {"heldout"}
    assert clips[0].video().shape == (16, 32, 48, 3), "of the world's own size"
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert record_heldout(tmp_path / "play", world_folder, None, config, _no_bar) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written, "what lies there is kept"
    longer = replace(config, episode_frames=80)
    assert record_heldout(tmp_path / "play", world_folder, None, longer, _no_bar) != folder, "other play lies beside it"


def test_a_lasting_recording_is_one_clip_with_room_for_a_chunk_before_it() -> None:
    for seconds in (3.0, 60.0, 61.3):
        lasting = HeldoutConfig().lasting(seconds)
        assert lasting.episode_frames == 4 * lasting.clip_frames
        for chunk in (1, 2, 3, 4):
            chunks = int(np.ceil(seconds * 17.5 / (4 * chunk)))
            assert (1 + chunks) * chunk <= lasting.clip_frames <= (4 + chunks) * chunk + 8
        assert lasting.scenes == HeldoutConfig().scenes
