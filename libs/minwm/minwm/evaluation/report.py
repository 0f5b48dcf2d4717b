"""The report page: `report.html`, and beside it the folder `report/` with the files it shows.

One page without scripts or outside requests, in light and dark. What was not handed in is shown as "not measured";
a file that is there but cannot be read is a DataError.
"""

import io
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader

from minwm.artifacts.registry import ModelVersion
from minwm.errors import DataError
from minwm.evaluation.commands import EVALUATION

REPORT, MEDIA = "report.html", "report"
_LOG, _MODEL_CONFIG = "log.jsonl", "model/config.json"
_INK = "#767676"  # plots lie on light and dark pages: grey is read on both
_HUES = ("#3b82c4", "#d9822b", "#4c9f70")
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
    curves = evaluation.get("psnr", {}).get("per_frame")
    sections = {
        "session video": session_video,
        "evaluation": evaluation,
        "latency": latency,
        "training stages": stages,
        "registry entry": inputs.registered,
    }
    missing = [name for name, content in sections.items() if not content]
    missing += [f"stage {name}" for name, stage in stages.items() if stage is None]
    # What a file lacks is undefined in the template too, and shown as not measured.
    environment = Environment(
        loader=PackageLoader("minwm.evaluation"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=inputs.title,
        missing=missing,
        hardware=hardware(),
        stages=stages,
        evaluation=evaluation,
        clips=clips,
        latency=latency,
        session_video=session_video,
        registered=inputs.registered,
        psnr_plot=curves and _plot(media, "psnr", _psnr_axes(curves, evaluation["world"]["fps"])),
    )


def hardware() -> dict[str, str]:
    """This machine: `cpu`, `cores` (those this process may use), `memory`; what /proc does not tell is absent."""
    found = {"cores": str(len(os.sched_getaffinity(0))), "system": f"{platform.system()} {platform.machine()}"}
    for path, key, name in (("/proc/cpuinfo", "model name", "cpu"), ("/proc/meminfo", "MemTotal", "memory")):
        if Path(path).is_file():
            rows = (line.partition(":") for line in Path(path).read_text().splitlines())
            values = [value.strip() for label, _, value in rows if label.strip() == key]
            found |= {name: values[0]} if values else {}
    if "memory" in found:
        found["memory"] = f"{int(found['memory'].removesuffix(' kB')) / 2**20:.1f} GiB"
    return found


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
        plot=_plot(media, f"loss-{name}", _loss_axes(losses)) if losses else "",
    )


def _series(
    steps: Sequence[int], lines: Sequence[Mapping[str, Any]], key: str
) -> tuple[Sequence[int], Sequence[float]]:
    """One loss by step; a step that a resumed run did again counts once."""
    found = {step: float(line[key]) for step, line in zip(steps, lines, strict=True) if key in line}
    return sorted(found), [found[step] for step in sorted(found)]


_Axes = Sequence[tuple[str, str, Sequence[tuple[str, Any, Any]]]]
"""Plots below each other: label of x, label of y, and lines as (name, x, y)."""


def _loss_axes(losses: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> _Axes:
    axes = []
    for name, (steps, values) in losses.items():
        lines: list[tuple[str, Any, Any]] = [("each step", steps, values)]
        if len(values) >= _SMOOTH_FROM:
            width = len(values) // 10
            mean = np.convolve(values, np.ones(width) / width, "valid")
            lines.append((f"mean of {width}", steps[width // 2 : width // 2 + len(mean)], mean))
        axes.append(("step", name.replace("_", " "), lines))
    return axes


def _psnr_axes(curves: Mapping[str, Sequence[float]], fps: float) -> _Axes:
    seconds = (np.arange(len(curves["generated"])) + 1) / fps
    return [
        (
            "seconds after the last given frame",
            "PSNR, dB",
            [(n.replace("_", " "), seconds, c) for n, c in curves.items()],
        )
    ]


def _plot(media: Path, name: str, axes: _Axes) -> str:
    """Draw the axes to an SVG beside the page; its address."""
    import matplotlib as mpl  # takes a second, and only the report draws
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.1 * len(axes)), layout="constrained")
        for place, (x_label, y_label, lines) in enumerate(axes):
            plot = figure.add_subplot(len(axes), 1, place + 1)
            for hue, (label, x, y) in zip(_HUES, lines, strict=False):
                plot.plot(x, y, color=hue, label=label, linewidth=1.4, marker="." if len(x) < _SMOOTH_FROM else "")
            plot.set_xlabel(x_label)
            plot.set_ylabel(y_label)
            plot.spines[["top", "right"]].set_visible(False)
            plot.patch.set_visible(False)
            if len(lines) > 1:
                plot.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lines))
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    (media / f"{name}.svg").write_text(buffer.getvalue())
    return f"{MEDIA}/{name}.svg"
