"""What benchmarks/streaming.py found, as tables and as plots."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from minwm.evaluation.plots import Axes, plot

Figures = Mapping[str, Any]
"""One row, or one curve."""

RATES = {"limit": "limit_fps", "engine": "fps", "baseline loop": "baseline_fps", "without a cache": "no_cache_fps"}
WAITS = {"first frame": "ttff_ms", "action to frame": "action_to_frame_ms"}
PARTS = ("denoise", "context", "decode", "other")


def show(report: Mapping[str, Any]) -> None:
    """Print the figures."""
    about = report["machine"]
    console = Console(highlight=False)
    console.print(f"{about['device']}, {about['threads']} threads, {report['dtype']}")
    for preset, rows in groupby(report["figures"], lambda one: one["preset"]):
        every = list(rows)
        timed = [one for one in every if "skipped" not in one]
        console.print(_table(f"{preset}: frames/s, and waits in ms", timed, _SPEED))
        console.print(_table(f"{preset}: ms of a chunk", timed, _CHUNK))
        for one in every:
            if "skipped" in one:
                console.print(f"{stem(one)}, {one['sessions']} sessions: skipped: {one['skipped']}")
    for curve in report["length"]:
        ratio = f"{curve['late_over_early']:.3f}"
        console.print(f"{stem(curve)}: {curve['far']:,} chunks on, a chunk takes {ratio} times as long")


def _formatted(form: str, name: str) -> Callable[[Figures], str]:
    return lambda one: form.format(one[name])


_SPEED: Mapping[str, Callable[[Figures], str]] = {
    "limit": _formatted("{:,.1f}", "limit_fps"),
    "engine": _formatted("{:,.1f}", "fps"),
    "baseline\nloop": _formatted("{:,.1f}", "baseline_fps"),
    "without\na cache": _formatted("{:,.1f}", "no_cache_fps"),
    "first\nframe": _formatted("{:,.0f}", "ttff_ms"),
    "action\nto frame": _formatted("{:,.0f}", "action_to_frame_ms"),
    "a session": lambda one: decimal(one["bytes_per_session"]),
}
_CHUNK: Mapping[str, Callable[[Figures], str]] = {
    **{part: _formatted("{:,.1f}", f"{part}_ms") for part in ("chunk", *PARTS)},
    "passes\n/ limit": _formatted("{:.2f}", "denoiser_over_limit"),
    "loop /\npasses": _formatted("{:.2f}", "baseline_over_denoiser"),
    "limit\n/ chunk": _formatted("{:.0%}", "matmul_share"),
}


def _table(title: str, rows: Sequence[Figures], columns: Mapping[str, Callable[[Figures], str]]) -> Table:
    table = Table("size", "steps:\nwindow", "×", *columns, title=title, box=box.SIMPLE_HEAD, padding=0)
    for one in rows:
        shape = f"{one['height']}x{one['width']}", f"{one['steps']}:{one['window']}", str(one["sessions"])
        table.add_row(*shape, *(text(one) for text in columns.values()))
    return table


def draw(folder: Path, figures: Sequence[Figures], curves: Sequence[Figures]) -> None:
    """A file of plots over the number of sessions for each fidelity, and one over the length of a session."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in by_fidelity(figures):
        (folder / f"{name}.svg").write_text(plot(name, over_sessions(rows)))
    for curve in curves:
        name = f"{stem(curve)}-length"
        axes = Axes("frames of a session", "chunk, ms", [("chunk", curve["frames"], curve["chunk_ms"])])
        (folder / f"{name}.svg").write_text(plot(name, [axes]))


def stem(one: Figures) -> str:
    """Name of the plots that figures are in."""
    return "streaming-{preset}-{height}x{width}-{steps}-steps-window-{window}".format(**one)


def by_fidelity(figures: Sequence[Figures]) -> Iterator[tuple[str, list[Figures]]]:
    """The rows that were timed, of each preset, size and fidelity."""
    for name, rows in groupby((one for one in figures if "skipped" not in one), stem):
        yield name, list(rows)


def over_sessions(rows: Sequence[Figures]) -> list[Axes]:
    """Plots of rows that differ in the number of sessions."""
    counts = [one["sessions"] for one in rows]

    def axes(label: str, lines: Mapping[str, str]) -> Axes:
        return Axes("sessions", label, [(line, counts, [one[name] for one in rows]) for line, name in lines.items()])

    memory = [one["sessions"] * one["bytes_per_session"] / 1e6 for one in rows]
    return [
        axes("frames/s, all sessions", RATES),
        axes("a chunk's ms", {part: f"{part}_ms" for part in PARTS}),
        axes("ms", WAITS),
        Axes("sessions", "MB, all sessions", [("memory", counts, memory)]),
    ]
