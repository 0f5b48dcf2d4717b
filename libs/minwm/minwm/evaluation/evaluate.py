"""A world measured on held-out clips: control, quality, drift and speed, as far as the configuration asks for.

Writes to a folder a video and a strip per clip, the videos of long walks and, last, `eval.json`: `world`, `dataset`,
`seed`, `rollout_seconds`, `clips`, `control` (see ControlMargin), `quality`, `controllability`, `teacher`, `long`,
`speed` (each empty where it was not asked for, or nobody was there to see), `figures` (see figures.py), `metrics` (the
same, flat) and `seconds`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minwm.data.clips import Clip, load_clips
from minwm.errors import ConfigError, DataError
from minwm.evaluation import long_walks
from minwm.evaluation.control import ControlMargin, control_margin
from minwm.evaluation.controllability import direction_shares, motion_errors, walking_pace
from minwm.evaluation.drift import appearance
from minwm.evaluation.figures import figures, metrics
from minwm.evaluation.judge import true_motions
from minwm.evaluation.measures import FRECHET_SECONDS, Critics, Measures, curve_tables, frechet_table, measure
from minwm.evaluation.pictures import write_pictures
from minwm.evaluation.rollouts import compare, many_steps, roll_out
from minwm.evaluation.speed import SpeedConfig, measure_speed
from minwm.evaluation.teacher import TeacherRecord, save_teacher
from minwm.evaluation.walks import along_clip
from minwm.models.backbones import Backbone
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import World
from minwm.progress import Report

EVALUATION, TEACHER = "eval.json", "teacher.npz"
CONTROL_LEVELS = 6
CONTROL_FRAMES = 8  # of a window, as in training

Bars = Callable[[str, int], AbstractContextManager[Report]]
"""Opens the progress display of a task, by its title and its units of work."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is measured. The defaults take half a minute on two cores; FULL takes a quarter of an hour.

    clips:         held-out clips to use, at most
    seconds:       of the rollouts along their true paths
    long_clips:    clips that a long walk starts from; 0 walks nowhere
    long_seconds:  of these walks
    speed:         how speed is measured; None does not
    teacher_clips: the first clips that a teacher rolls out, at most
    teacher_steps, teacher_guidance: that it takes, and by its prompt; guidance 1 is none
    """

    clips: int = 8
    seconds: float = 1.8
    seed: int = 0
    long_clips: int = 0
    long_seconds: float = 60.0
    speed: SpeedConfig | None = None
    teacher_clips: int = 12
    teacher_steps: int = 48
    teacher_guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.clips < 2:
            raise ConfigError(f"clips={self.clips}: expected at least 2, poses are exchanged between clips")
        if self.long_clips < 0 or min(self.seconds, self.long_seconds, self.teacher_clips, self.teacher_steps) <= 0:
            raise ConfigError(f"evaluation: {self}: expected counts and times above 0")


FULL = EvaluationConfig(clips=24, seconds=5.0, long_clips=4, speed=SpeedConfig())


@contextmanager
def _silent(title: str, total: int) -> Iterator[Report]:
    yield lambda done, note="": None


@dataclass(frozen=True)
class _Rolled:
    """What was measured of each source along the clips' true paths, in the clips' order."""

    measures: dict[str, list[Measures]] = field(default_factory=dict)
    appearances: list[NDArray[np.float64]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)

    def others(self) -> dict[str, list[Measures]]:
        """The sources but the true frames."""
        return {source: measured for source, measured in self.measures.items() if source != "real"}


def evaluate(
    world: World,
    data: Path,
    out: Path,
    config: EvaluationConfig = EvaluationConfig(),
    *,
    critics: Critics = Critics(),  # noqa: B008 (frozen)
    teacher: Backbone | TeacherRecord | None = None,
    base: Backbone | None = None,
    long_data: Path | None = None,
    bars: Bars = _silent,
) -> dict[str, Any]:
    """Measure a world, write the results to `out`, and return what `eval.json` holds.

    A `teacher` is rolled out, or is known from an earlier evaluation; it and the bidirectional `base` are also timed.
    Long walks start from the held-out clips of `long_data`, or else of `data`.
    Raises DataError for a dataset without two held-out clips that fit the world.
    """
    started = time.monotonic()
    clips, digest = _load(world, data, config.clips)
    walked = clips if long_data is None else load_clips(long_data, "heldout")[0]
    chunk, fps = world.backbone.config.history.chunk, world.card.fps
    chunks = min(_chunks(world, config.seconds), min(len(clip.latents) for clip in clips) // chunk - 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / EVALUATION).unlink(missing_ok=True)  # an older one would make new pictures look complete
    control = _control(world, clips, config.seed, bars)
    with bars("rollouts", len(clips)) as report:
        rolled = _roll(world, clips, chunks, config.seed, critics, out, report)
    length = chunks * chunk * FRAMES_PER_LATENT
    result: dict[str, Any] = {
        "world": {"name": world.card.name, "steps": world.card.steps, "fps": fps},
        "dataset": digest,
        "seed": config.seed,
        "rollout_seconds": length / fps,
        "clips": rolled.pictures,
        "control": {**asdict(control), "learned": control.learned, "verdict": control.verdict()},
        "quality": {
            **curve_tables(rolled.others(), fps),
            "frechet": frechet_table(rolled.others(), rolled.measures["real"], length, fps),
        },
        "controllability": _controllability(world, clips, rolled),
        "teacher": {}
        if teacher is None
        else _teacher(world, teacher, clips, rolled, chunks, config, critics, out, bars),
        "long": _long(world, walked, rolled, config, critics, out, bars) if config.long_clips else {},
        "speed": {} if config.speed is None else _speed(world, config.speed, base, teacher, bars),
    }
    result |= {"figures": figures(result), "seconds": round(time.monotonic() - started, 3)}
    result["metrics"] = metrics(result)
    write_json(out / EVALUATION, result)
    return result


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _load(world: World, data: Path, count: int) -> tuple[list[Clip], str]:
    """The clips to use, each of two chunks at least, and the dataset's digest."""
    heldout, manifest = load_clips(data, "heldout")
    clips, least = _spread(heldout, count), 2 * world.backbone.config.history.chunk
    shortest = min(len(clip.latents) for clip in clips)
    if shortest < least:
        raise DataError(f"{data}: a held-out clip has {shortest} latent frames, expected at least {least}")
    return clips, manifest.digest()


def _chunks(world: World, seconds: float) -> int:
    """Chunks that fill so many seconds."""
    frames = world.backbone.config.history.chunk * FRAMES_PER_LATENT
    return math.ceil(round(seconds * world.card.fps) / frames)


def _control(world: World, clips: Sequence[Clip], seed: int, bars: Bars) -> ControlMargin:
    frames = min(CONTROL_FRAMES, *(len(clip.latents) for clip in clips))
    with bars("control", CONTROL_LEVELS) as report:
        return control_margin(world.backbone, clips, seed=seed, levels=CONTROL_LEVELS, frames=frames, progress=report)


def _roll(
    world: World, clips: Sequence[Clip], chunks: int, seed: int, critics: Critics, out: Path, report: Report
) -> _Rolled:
    """Roll out every clip and measure it; frames are not kept."""
    rolled = _Rolled()
    for done, clip in enumerate(clips, start=1):
        comparison = compare(world, clip, chunks=chunks, seed=seed)
        given, true = comparison.given, comparison.true
        for source, frames in {"real": true, **comparison.others}.items():
            rolled.measures.setdefault(source, []).append(measure(frames, true, given, critics, world.card.fps))
        rolled.appearances.append(appearance(true))
        names = write_pictures(comparison, ("generated",), out, world.card.fps)
        rolled.pictures.append({"name": clip.name, "scene": scene_of(clip), **names})
        report(done)
    return rolled


def scene_of(clip: Clip) -> str:
    """Where the clip plays; its caption begins with it."""
    return clip.caption.partition(":")[0]


def _controllability(world: World, clips: Sequence[Clip], rolled: _Rolled) -> dict[str, Any]:
    """Errors of seen motions and the commanded directions' shares, by source and, for generated frames, by scene."""
    if rolled.measures["real"][0].motions is None:
        return {}
    chunk, card = world.backbone.config.history.chunk, world.card
    frames = len(rolled.measures["real"][0].motions)
    true = [true_motions(clip.poses[chunk - 1 : chunk + frames]) for clip in clips]

    def directions(source: str, chosen: Sequence[int]) -> dict[str, Any]:
        seen = [rolled.measures[source][place].motions for place in chosen]
        shares = direction_shares(
            np.concatenate([motions for motions in seen if motions is not None]),
            np.concatenate([true[place] for place in chosen]),
            chunk=chunk,
            pace=walking_pace(card),
        )
        return {name: share.to_json() for name, share in shares.items()}

    def errors(source: str) -> dict[str, Any]:
        seen = np.concatenate([one.motions for one in rolled.measures[source] if one.motions is not None])
        return {**motion_errors(seen, np.concatenate(true)).to_json(), "directions": directions(source, everyone)}

    everyone = range(len(clips))
    scenes = {scene: [i for i in everyone if scene_of(clips[i]) == scene] for scene in map(scene_of, clips)}
    return {
        "clips": len(clips),
        "seconds": frames * FRAMES_PER_LATENT / card.fps,
        **{source: errors(source) for source in ("generated", "autoencoder", "real")},
        "scenes": {
            scene: {"clips": len(chosen), "directions": directions("generated", chosen)}
            for scene, chosen in sorted(scenes.items())
        },
    }


def _teacher(
    world: World,
    teacher: Backbone | TeacherRecord,
    clips: Sequence[Clip],
    rolled: _Rolled,
    chunks: int,
    config: EvaluationConfig,
    critics: Critics,
    out: Path,
    bars: Bars,
) -> dict[str, Any]:
    """The student beside its teacher, whose record is written to `out`."""
    shown = min(chunks, _chunks(world, FRECHET_SECONDS))
    if isinstance(teacher, TeacherRecord):
        record, needed = teacher, _holds_for(world, shown, critics)
        if record.about != needed:
            raise DataError(f"teacher: its record is of {record.about}, expected {needed}")
    else:
        pupils = _spread(clips, config.teacher_clips)
        with bars("teacher", len(pupils)) as report:
            record = _teach(replace(world, backbone=teacher), pupils, shown, config, critics, report)
    save_teacher(out / TEACHER, record)
    return _beside_teacher(clips, rolled, record, world.card.fps)


def _long(
    world: World,
    clips: Sequence[Clip],
    rolled: _Rolled,
    config: EvaluationConfig,
    critics: Critics,
    out: Path,
    bars: Bars,
) -> dict[str, Any]:
    starts, real = _spread(clips, config.long_clips), np.concatenate(rolled.appearances)
    with bars("long walks", len(starts) * _chunks(world, config.long_seconds)) as report:
        return long_walks.measure(world, starts, config.long_seconds, config.seed, critics.motion, real, out, report)


def _speed(
    world: World, config: SpeedConfig, base: Backbone | None, teacher: Backbone | TeacherRecord | None, bars: Bars
) -> dict[str, Any]:
    many = teacher if isinstance(teacher, Backbone) else None
    with bars("speed", config.rounds) as report:
        return measure_speed(world, config, base=base, teacher=many, progress=report)


def _teach(
    world: World, clips: Sequence[Clip], chunks: int, config: EvaluationConfig, critics: Critics, report: Report
) -> TeacherRecord:
    """Roll out clips with a world whose backbone is the teacher, for as long as a Fréchet distance needs."""
    sampling = many_steps(world.backbone.config, config.teacher_steps, config.teacher_guidance)
    given, found = world.backbone.config.history.chunk * FRAMES_PER_LATENT, {}
    for done, clip in enumerate(clips, start=1):
        frames = roll_out(world, along_clip(world, clip, chunks), seed=config.seed, sampling=sampling)
        video = clip.video()[: given + len(frames)]
        found[clip.name] = measure(frames, video[given:], video[:given], critics, world.card.fps)
        report(done)
    return TeacherRecord(
        steps=config.teacher_steps,
        guidance=config.teacher_guidance,
        about=_holds_for(world, chunks, critics),
        measures=found,
    )


def _holds_for(world: World, chunks: int, critics: Critics) -> dict[str, Any]:
    """What a teacher's measures have to have in common with its student's."""
    frames = chunks * world.backbone.config.history.chunk * FRAMES_PER_LATENT
    return {"size": [world.card.height, world.card.width], "frames": frames, "critics": critics.name}


def _beside_teacher(clips: Sequence[Clip], rolled: _Rolled, record: TeacherRecord, fps: float) -> dict[str, Any]:
    """Both on the clips that the teacher's record has; raises DataError when these are fewer than two."""
    places = [place for place, clip in enumerate(clips) if clip.name in record.measures]
    if len(places) < 2:
        raise DataError(f"teacher: its record has {len(places)} of the clips evaluated here, expected at least 2")
    sources = {
        "generated": [rolled.measures["generated"][place] for place in places],
        "teacher": [record.measures[clips[place].name] for place in places],
    }
    length = min(len(one.psnr) for measured in sources.values() for one in measured)
    distances = frechet_table(sources, [rolled.measures["real"][place] for place in places], length, fps)
    return {
        "clips": len(places),
        "steps": record.steps,
        "guidance": record.guidance,
        **curve_tables(sources, fps),
        "frechet": distances,
        "fewstep_over_teacher": distances["generated"] / distances["teacher"] if distances else None,
    }


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """At most `count` of them, at even distances, so that every episode has its share."""
    count = min(count, len(clips))
    return [clips[place * len(clips) // count] for place in range(count)]
