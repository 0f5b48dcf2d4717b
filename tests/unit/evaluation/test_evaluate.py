import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minwm.data.clips import KIND, load_clips
from minwm.data.shards import ShardWriter
from minwm.data.video import decode_video
from minwm.errors import ConfigError, DataError
from minwm.evaluation.evaluate import TEACHER, EvaluationConfig, evaluate
from minwm.evaluation.figures import ALWAYS
from minwm.evaluation.judge import true_motions
from minwm.evaluation.measures import Critics
from minwm.evaluation.quality import psnr
from minwm.evaluation.rollouts import roll_out
from minwm.evaluation.teacher import load_teacher
from minwm.evaluation.walks import along_clip
from minwm.models.worlds import World

from .conftest import Evaluated, MakeClip

pytestmark = pytest.mark.unit


def test_the_quick_form_measures_control_and_pixels(world: World, dataset: Path, tmp_path: Path) -> None:
    result = evaluate(world, dataset, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result
    assert [clip["name"] for clip in result["clips"]] == ["clip-001", "clip-002", "clip-003"]
    assert result["control"]["clips"] == 3
    clips, _ = load_clips(dataset, "heldout")
    generated = [roll_out(world, along_clip(world, clip, 4), seed=0) for clip in clips]
    expected = np.mean([psnr(f, c.video()[8:40])[17] for f, c in zip(generated, clips, strict=True)])  # round(17.5) - 1
    assert result["figures"]["psnr_1s"] == {"value": pytest.approx(expected), "clips": 3}
    assert result["metrics"]["psnr_1s"] == result["figures"]["psnr_1s"]["value"]
    assert all(np.isfinite(value) for value in result["metrics"].values())
    for section in ("controllability", "teacher", "long", "speed"):
        assert result[section] == {}, section
    for name in ("turn_direction", "in_range_60s", "fewstep_over_teacher"):
        assert result["figures"][name]["value"] is None and result["figures"][name]["missing"], name
        assert name not in result["metrics"]


def test_the_full_form_has_every_figure_with_the_clips_behind_it(full: Evaluated) -> None:
    figures = full.result["figures"]
    expected = set(ALWAYS) - {"in_range_60s"}  # the walk took two seconds
    expected |= {"in_range_2s", "in_range_0_2s", "turn_direction_0_2s", "estimator_turn_direction", "frechet_1.8s"}
    expected |= {
        "estimator_turn_direction_0_2s",
        "bidirectional_over_ours",
        "first_frame_seconds_student_2",
        "frechet_1.8s_teacher",
        "perceptual_1s",
    }
    for name in expected:
        behind = figures[name].get("clips", figures[name].get("rounds"))
        assert np.isfinite(figures[name]["value"]) and behind > 0, name
    assert figures["turn_direction"]["clips"] == 3 and figures["in_range_2s"]["clips"] == 1
    assert figures["fewstep_over_teacher"]["clips"] == 2
    distances = full.result["teacher"]["frechet"]
    assert figures["fewstep_over_teacher"]["value"] == pytest.approx(distances["generated"] / distances["teacher"])


def test_long_walks_start_from_clips_of_their_own_where_these_are_given(
    world: World, dataset: Path, make_clip: MakeClip, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "lasting", KIND) as writer:
        writer.add("lasting", make_clip(9, latent_frames=8).to_files())
    config = EvaluationConfig(clips=2, long_clips=2, long_seconds=1.0)
    found = evaluate(world, dataset, tmp_path / "out", config, long_data=tmp_path / "lasting")["long"]
    assert [walk["name"] for walk in found["videos"]] == ["lasting"] and found["scripted"] == 0


def test_errors_are_those_of_what_the_estimator_saw(
    full: Evaluated, world: World, dataset: Path, critics: Critics
) -> None:
    assert critics.motion is not None
    clips, _ = load_clips(dataset, "heldout")
    seen = [critics.motion.motions(clip.video()[4:40]) for clip in clips]
    wrong = np.abs(np.concatenate(seen) - np.concatenate([true_motions(clip.poses[1:10]) for clip in clips]))
    assert full.result["controllability"]["real"]["rotation_error_deg"] == pytest.approx(wrong[:, 3].mean(), rel=1e-4)
    assert full.result["figures"]["estimator_rotation_error_deg"]["value"] == pytest.approx(
        wrong[:, 3].mean(), rel=1e-4
    )
    scenes = full.result["controllability"]["scenes"]
    assert {scene: found["clips"] for scene, found in scenes.items()} == {"maze e1m1": 1, "maze e1m2": 2}


def test_a_teachers_record_stands_in_for_the_teacher(
    full: Evaluated, world: World, dataset: Path, critics: Critics, tmp_path: Path
) -> None:
    record = load_teacher(full.folder / TEACHER)
    config = EvaluationConfig(seconds=1.8)
    again = evaluate(world, dataset, tmp_path / "again", config, critics=critics, teacher=record)
    for name in ("fewstep_over_teacher", "frechet_1.8s_teacher"):
        assert again["figures"][name]["value"] == pytest.approx(full.result["figures"][name]["value"], rel=1e-3), name
    for other in ({"size": [64, 96]}, {"frames": 8}, {"critics": "others"}):
        with pytest.raises(DataError, match="its record is of"):
            other_record = replace(record, about={**record.about, **other})
            evaluate(
                world, dataset, tmp_path / "again", replace(config, clips=2), critics=critics, teacher=other_record
            )
    foreign = replace(record, measures={"elsewhere": record.measures["clip-001"]})
    with pytest.raises(DataError, match="has 0 of the clips"):
        evaluate(world, dataset, tmp_path / "again", config, critics=critics, teacher=foreign)


def test_evaluation_is_the_same_every_time(world: World, dataset: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(clips=2, seed=3)
    first, second = (evaluate(world, dataset, tmp_path / name, config) for name in "ab")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert len(first["clips"]) == 2


def test_short_clips_give_short_rollouts(world: World, make_clip: MakeClip, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "short", KIND) as writer:
        for number in range(2):
            writer.add(f"c{number}", make_clip(number, latent_frames=6).to_files())
    result = evaluate(world, tmp_path / "short", tmp_path / "out")
    psnr_table = result["quality"]["psnr"]
    assert len(psnr_table["per_frame"]["generated"]) == 16
    assert [row["seconds"] for row in psnr_table["at"]] == [0.5]
    for clip in result["clips"]:
        assert len(decode_video((tmp_path / "out" / clip["video"]).read_bytes(), where="test")) == 8 + 16


def test_what_cannot_be_evaluated_leaves_no_result(
    world: World, dataset: Path, make_clip: MakeClip, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(world, dataset, out, EvaluationConfig(clips=2))
    with pytest.raises(ConfigError, match="clips=1"):
        EvaluationConfig(clips=1)
    with ShardWriter(tmp_path / "one", KIND) as writer:
        writer.add("only", make_clip(0).to_files())
    with pytest.raises(DataError, match="at least 2"):
        evaluate(world, tmp_path / "one", out)
    assert not (out / "eval.json").exists()
