"""Clips to batches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from minwm.data.clips import Clip
from minwm.errors import DataError
from minwm.models.text import byte_tokens
from minwm.training.batch import WindowConfig, cut_windows
from minwm.training.draw import Draw

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]


def test_a_window_is_a_piece_of_its_clip_with_cameras_relative_to_its_first_frame(new_clips: NewClips) -> None:
    clips, starts = new_clips(20, 9), set()
    batch = cut_windows(clips, Draw(0, 0, range(20)), WindowConfig(frames=4), 12)
    for clip, latents, viewmats, intrinsics in zip(
        clips, batch.latents, batch.cameras.viewmats, batch.cameras.intrinsics, strict=True
    ):
        truth = torch.from_numpy(clip.latents).float()
        (start,) = (s for s in range(6) if torch.equal(truth[s : s + 4], latents))
        starts.add(start)
        first = clip.poses[start]
        expected = [np.linalg.inv(pose) @ first for pose in clip.poses[start : start + 4]]
        np.testing.assert_allclose(viewmats, expected, atol=1e-4)
        np.testing.assert_array_equal(intrinsics, clip.intrinsics)
    assert starts == set(range(6)), "every start is drawn, the last one too"


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, True), (1.0, False)])
def test_captions_are_dropped_as_often_as_asked(new_clips: NewClips, dropout: float, kept: bool) -> None:
    clips = new_clips(4, 4)
    batch = cut_windows(clips, Draw(0, 0, range(4)), WindowConfig(frames=4, prompt_dropout=dropout), 12)
    expected = byte_tokens([clip.caption if kept else "" for clip in clips], 12)
    assert torch.equal(batch.text, expected)


def test_a_sample_s_window_does_not_depend_on_its_batch(new_clips: NewClips) -> None:
    clips, config = new_clips(3, 9), WindowConfig(frames=4, prompt_dropout=0.5)
    together = cut_windows(clips, Draw(0, 0, [10, 11, 12]), config, 12)
    alone = cut_windows(clips[1:2], Draw(0, 0, [11]), config, 12)
    assert torch.equal(alone.latents[0], together.latents[1])
    assert torch.equal(alone.text[0], together.text[1])
    assert torch.equal(alone.cameras.viewmats[0], together.cameras.viewmats[1])


def test_a_clip_shorter_than_the_window_is_named(new_clips: NewClips) -> None:
    with pytest.raises(DataError, match="clip clip-0: has 3 latent frames, windows need 4"):
        cut_windows(new_clips(1, 3), Draw(0, 0, [0]), WindowConfig(frames=4), 12)
