"""The report page: `report.html`, and beside it the folder `report/` with the files it shows.

One page without scripts or outside requests, in light and dark. What was not handed in is shown as "not measured";
a file that is there but cannot be read is a DataError.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minwm.artifacts.registry import ModelVersion
from minwm.errors import DataError
from minwm.evaluation.evaluate import EVALUATION
from minwm.evaluation.page import curve_axes, hardware, render
from minwm.evaluation.plots import Axes, Line, plot

REPORT, MEDIA = "report.html", "report"
_LOG, _MODEL_CONFIG = "log.jsonl", "model/config.json"
_SMOOTH_FROM = 40  # steps from which a running mean is drawn over the losses


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What the page shows; whatever is absent, or a path with nothing there, is "not measured".

    evaluation:    the folder that `minwm eval` wrote
    session_video: an MP4 of a session, its pressed keys drawn on it
    latency:       the JSON of `minwm play --report`
    stages:        run folders of the training stages by name, in order
    registered:    the version that the world was registered as
    """

    title: str = "minwm"
    evaluation: Path | None = None
    session_video: Path | None = None
    latency: Path | None = None
    stages: Mapping[str, Path] = field(default_factory=dict)
    registered: ModelVersion | None = None


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One training run. `about` is what its model says of its origin: `from`, `batch_size`, …"""

    name: str
    steps: int
    seconds: float
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    about: Mapping[str, Any]
    plot: str


def write_report(folder: Path, inputs: ReportInputs) -> Path:
    """Write the page to `folder`, replacing an earlier one; the page's path. Raises DataError for a damaged input."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{MEDIA}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        html = _page(inputs, aside)
        page = folder / REPORT
        page.unlink(missing_ok=True)  # never an old page with new files
        shutil.rmtree(folder / MEDIA, ignore_errors=True)
        os.replace(aside, folder / MEDIA)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    partial = folder / f".{REPORT}.{os.getpid()}"
    partial.write_text(html)
    os.replace(partial, page)
    return page


def _page(inputs: ReportInputs, media: Path) -> str:
    evaluation = _read_json(inputs.evaluation and inputs.evaluation / EVALUATION)
    latency = _read_json(inputs.latency)
    session_video = _copy(inputs.session_video, media, "session.mp4")
    stages = {name: _read_stage(name, path, media) for name, path in inputs.stages.items()}
    clips = [
        {**clip, **{kind: _copy((inputs.evaluation or Path()) / clip[kind], media) for kind in ("video", "strip")}}
        for clip in evaluation.get("clips", ())
    ]
    curves = evaluation.get("quality", {}).get("psnr")
    sections = {
        "session video": session_video,
        "evaluation": evaluation,
        "latency": latency,
        "training stages": stages,
        "registry entry": inputs.registered,
    }
    missing = [name for name, content in sections.items() if not content]
    missing += [f"stage {name}" for name, stage in stages.items() if stage is None]
    return render(
        "report.html.j2",
        title=inputs.title,
        missing=missing,
        hardware=hardware(),
        stages=stages,
        evaluation=evaluation,
        clips=clips,
        latency=latency,
        session_video=session_video,
        registered=inputs.registered,
        psnr_plot=curves and _draw(media, "psnr", [curve_axes("psnr", curves, evaluation["world"]["fps"])]),
    )


def _draw(media: Path, name: str, axes: Sequence[Axes]) -> str:
    """Draw a plot to a file beside the page; its address."""
    (media / f"{name}.svg").write_text(plot(name, axes))
    return f"{MEDIA}/{name}.svg"


def _read_json(path: Path | None) -> dict[str, Any]:
    """The object in a file, empty where there is no file."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _copy(path: Path | None, media: Path, name: str = "") -> str:
    """Put a file beside the page; its address there, or nothing where there is no file."""
    if path is None or not path.is_file():
        return ""
    shutil.copyfile(path, media / (name or path.name))
    return f"{MEDIA}/{name or path.name}"


def _read_stage(name: str, folder: Path, media: Path) -> _Stage | None:
    """A training run from its log, with its loss plot; None where there is no log."""
    log = folder / _LOG
    if not log.is_file():
        return None
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        steps, seconds = [int(line["step"]) for line in lines], [float(line["seconds"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{log}: not a training log ({error!r})") from error
    if not lines:
        return None
    names = sorted({key for line in lines for key in line if key.endswith("_loss")})
    losses = {key: _series(steps, lines, key) for key in names}
    # A resumed run's clock starts again: every fall of the clock ends a part.
    ends = [now for now, following in zip(seconds, [*seconds[1:], 0.0], strict=True) if following < now]
    return _Stage(
        name=name,
        steps=steps[-1] + 1,
        seconds=sum(ends),
        losses=losses,
        about=_read_json(folder / _MODEL_CONFIG).get("about", {}),
        plot=_draw(media, f"loss-{name}", _loss_axes(losses)) if losses else "",
    )


def _series(
    steps: Sequence[int], lines: Sequence[Mapping[str, Any]], key: str
) -> tuple[Sequence[int], Sequence[float]]:
    """One loss by step; a step that a resumed run did again counts once."""
    found = {step: float(line[key]) for step, line in zip(steps, lines, strict=True) if key in line}
    return sorted(found), [found[step] for step in sorted(found)]


def _loss_axes(losses: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> list[Axes]:
    axes = []
    for name, (steps, values) in losses.items():
        lines: list[Line] = [("each step", steps, values)]
        if len(values) >= _SMOOTH_FROM:
            width = len(values) // 10
            mean = np.convolve(values, np.ones(width) / width, "valid")
            lines.append((f"mean of {width}", steps[width // 2 : width // 2 + len(mean)], mean))
        axes.append(Axes("step", name.replace("_", " "), lines))
    return axes
