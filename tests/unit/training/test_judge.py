"""Stage judge: samples and their motions, each kind of damage by itself, and a judge that loads in the end."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.data.episode import Episode, write_episodes
from minwm.errors import ConfigError, DataError
from minwm.evaluation.judge import load_judge, true_motions
from minwm.training.draw import Draw
from minwm.training.judge import (
    Damage,
    JudgeStage,
    JudgeStageConfig,
    damaged,
    known_labels,
    load_play,
    play_of,
)
from minwm.training.recipe import load_recipe, run_recipe

pytestmark = pytest.mark.unit

NewEpisodes = Callable[[int, int], list[Episode]]
RECIPE = Path(__file__).parents[3] / "recipes/doom/judge.yaml"
CLEAN = Damage(blur=0, blocks=0, noise=0, tone=0)


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(6, 5, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_a_sample_is_a_window_at_some_pace_with_its_motion(new_episodes: NewEpisodes) -> None:
    play = play_of(new_episodes(1, 7)[0])
    stage = JudgeStage(JudgeStageConfig(label_episodes=1, damage=CLEAN), [play], 0)
    batch = stage.prepare([play] * 120, Draw(0, 0, range(120)))
    assert batch.frames.shape == (120, 5, 3, 72, 96)
    candidates = {}
    for start in range(3):
        for pace in range(5):
            places = [start + round(pace * i / 4) for i in range(5)]
            for order in (places, places[::-1]):
                for flip in (1, -1):
                    motion = true_motions(play.poses[[order[0], order[-1]]])[0] * (flip, 1, 1, flip)
                    label = float("GreenTorch" in play.labels[order[-1]])
                    candidates[(tuple(order), flip)] = (play.frames[order][:, :, ::flip], motion, label)
    found = set()
    for frames, motion, label in zip(batch.frames, batch.motions, batch.labels, strict=True):
        pixels = (frames.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        matches = [key for key, (truth, _, _) in candidates.items() if np.array_equal(pixels, truth)]
        assert matches, "every sample is five frames of the play"
        _, expected, seen = candidates[matches[0]]
        np.testing.assert_allclose(motion, expected, atol=1e-6)
        assert label.tolist() == [seen]
        found.add(matches[0])
    still = {(tuple([s] * 5), flip) for s in range(3) for flip in (1, -1)}
    assert len(found) > 30 and {flip for _, flip in found} == {1, -1} and found & still
    assert {order[-1] - order[0] for order, _ in found} == set(range(-4, 5)), "every pace, both ways"


def test_a_sample_is_the_same_alone_and_in_a_batch(new_episodes: NewEpisodes) -> None:
    plays = [play_of(episode) for episode in new_episodes(4, 9)]
    stage = JudgeStage(JudgeStageConfig(label_episodes=1), plays, 0)
    whole = stage.prepare(plays, Draw(3, 5, range(4)))
    for number, play in enumerate(plays):
        alone = stage.prepare([play], Draw(3, 5, [number]))
        torch.testing.assert_close(alone.frames[0], whole.frames[number], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.motions[0], whole.motions[number])


def test_nothing_is_damaged_where_none_is_asked_for() -> None:
    torch.testing.assert_close(damaged(pictures(), Draw(0, 0, range(6)), CLEAN), pictures(), atol=1e-6, rtol=0)


def test_noise_is_as_strong_as_drawn_and_half_have_none() -> None:
    draw = Draw(0, 1, range(64))
    frames = torch.full((64, 5, 3, 16, 24), 0.5)
    spread = damaged(frames, draw, Damage(blur=0, blocks=0, noise=0.2, tone=0)).flatten(1).std(1)
    assert 20 < int((spread > 1e-6).sum()) < 44, "about half"
    assert 0.1 < float(spread.max()) <= 0.21


def test_blur_is_a_gaussian_of_the_drawn_width() -> None:
    point = torch.zeros(64, 5, 3, 16, 24)
    point[:, :, :, 8, 12] = 1
    blurred = damaged(point, Draw(0, 2, range(64)), Damage(blur=1.5, blocks=0, noise=0, tone=0))
    widths = set()
    for frames in blurred[:, 0, 0].double():
        torch.testing.assert_close(frames.sum(), torch.tensor(1.0).double(), atol=1e-5, rtol=0)
        row = frames.sum(0)[8:17]
        width = math.sqrt(1 / (2 * math.log(row[4] / row[5]))) if row[5] > 1e-12 else 0.0
        widths.add(round(width, 2))
        expected = torch.tensor([math.exp(-0.5 * (x / width) ** 2) if width else float(x == 0) for x in range(-4, 5)])
        torch.testing.assert_close(row, (expected / expected.sum()).double(), atol=1e-5, rtol=0)
    assert 0.0 in widths and 1.0 < max(widths) <= 1.5


def test_blocks_are_cosine_coefficients_rounded_to_steps() -> None:
    quantised = damaged(pictures(), Draw(0, 3, range(6)), Damage(blur=0, blocks=0.5, noise=0, tone=0))
    changed = [i for i in range(6) if not torch.allclose(quantised[i], pictures()[i], atol=1e-4)]
    assert 0 < len(changed) < 6, "some samples, not all"

    def coefficient(block: torch.Tensor, v: int, u: int) -> float:
        scale = math.sqrt((1 if v else 0.5) * (1 if u else 0.5)) / 4
        terms = [
            float(block[y, x]) * math.cos((2 * y + 1) * v * math.pi / 16) * math.cos((2 * x + 1) * u * math.pi / 16)
            for y in range(8)
            for x in range(8)
        ]
        return scale * sum(terms)

    strength = (2 * Draw(0, 3, range(6)).uniform("damage", (3,))[:, 1] - 1).clamp(min=0) * 0.5
    for sample in changed:
        block = quantised[sample, 2, 1, 8:16, 16:24].double()
        for v, u in ((0, 0), (0, 3), (5, 2), (7, 7)):
            steps = coefficient(block, v, u) / (float(strength[sample]) * (1 + v + u))
            assert abs(steps - round(steps)) < 1e-3, f"coefficient {v}, {u} of sample {sample}"


def test_tone_keeps_what_the_picture_shows() -> None:
    toned = damaged(pictures(), Draw(0, 4, range(6)), Damage(blur=0, blocks=0, noise=0, tone=0.5))
    for before, after in zip(pictures().flatten(0, 2), toned.flatten(0, 2), strict=True):
        correlation = torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]
        assert correlation > 0.9999, "linear in every channel of every frame"
    assert (toned.mean((1, 2, 3, 4)) - pictures().mean((1, 2, 3, 4))).abs().max() > 0.05


def test_names_seen_in_few_episodes_are_not_learned(new_episodes: NewEpisodes) -> None:
    plays = [play_of(episode) for episode in new_episodes(3, 6)]
    plays[0].labels[2] = ["Clip", "GreenTorch"]
    assert known_labels(plays, 1) == ("Clip", "GreenTorch")
    assert known_labels(plays, 2) == ("GreenTorch",)


def test_held_out_episodes_are_not_trained_on(new_episodes: NewEpisodes, tmp_path: Path) -> None:
    episodes = new_episodes(6, 5)
    manifest = write_episodes(episodes, tmp_path / "data", {})
    plays, digest = load_play(tmp_path / "data", 3)
    assert digest == manifest.digest()
    kept = [episodes[i].poses for i in (0, 1, 3, 4)]
    np.testing.assert_array_equal([play.poses for play in plays], kept)


def test_what_cannot_be_trained_with_is_refused(new_episodes: NewEpisodes) -> None:
    with pytest.raises(DataError, match="has 4 frames, expected 5"):
        play_of(new_episodes(1, 4)[0])
    with pytest.raises(ConfigError, match="heldout_every=1"):
        JudgeStageConfig(heldout_every=1)
    with pytest.raises(ConfigError, match="blur=-1"):
        Damage(blur=-1)


def test_the_recipe_trains_a_judge_that_loads(new_episodes: NewEpisodes, tmp_path: Path) -> None:
    write_episodes(new_episodes(6, 6), tmp_path / "data", {})
    changes = [f"data={tmp_path / 'data'}", "run.steps=2", "run.batch_size=4", "run.engine=torch"]
    folder = run_recipe(load_recipe(RECIPE, [*changes, "method.label_episodes=1"]), tmp_path / "run")
    judge = load_judge(folder)
    assert judge.config.labels == ("GreenTorch",) and judge.config.scenes == ("maze:E1M1",)
    assert judge.motions(new_episodes(1, 8)[0].frames).shape == (1, 4)
