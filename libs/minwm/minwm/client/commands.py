"""The client's command: `minwm play`."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minwm.errors import ConfigError
from minwm.geometry.trajectory import parse
from minwm.progress import progress_bar


def register(app: typer.Typer) -> None:
    """Add `play` to the command line."""
    app.command(name="play")(play)


def play(
    trajectory: Annotated[str, typer.Argument(help="Keys and how many chunks to hold them, such as w*4,w+l*4,d*2.")],
    out: Annotated[Path, typer.Option(help="Video of the session, with the pressed keys drawn on it.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of the session service.")] = "127.0.0.1:9000",
    report: Annotated[Path | None, typer.Option(help="Latencies as JSON.")] = None,
    model: Annotated[str, typer.Option(help="Model to play; the served one if not given.")] = "",
    prompt: Annotated[str, typer.Option(help="What the world is.")] = "",
    start: Annotated[str | None, typer.Option(help="A start image of the model, or a PNG or JPEG file.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same world.")] = 0,
) -> None:
    """Play a trajectory live on a session service, and keep the video and the latencies."""
    from minwm.client.playback import play_trajectory, write_report, write_video  # gRPC takes a while to import

    steps = parse(trajectory)
    with progress_bar("Playing", sum(step.count for step in steps)) as show:
        playback = asyncio.run(
            play_trajectory(
                address,
                steps,
                model=model,
                prompt=prompt,
                start=_start(start),
                seed=seed,
                progress=lambda done, _: show(done),
            )
        )
    with progress_bar("Writing the video", playback.report.chunks) as show:
        write_video(playback, out, lambda done, _: show(done))
    if report is not None:
        write_report(playback.report, report)
    figures = playback.report
    latency = figures.action_to_frame_seconds
    table = Table("figure", "value", title=f"{figures.model}: {figures.chunks} chunks, {figures.frames} frames")
    table.add_row("time to first frame", f"{figures.time_to_first_frame_seconds:.3f} s")
    table.add_row("action to frame, P50 / P95", f"{latency.p50:.3f} / {latency.p95:.3f} s")
    table.add_row("frames per second", f"{figures.frames_per_second:.2f}")
    table.add_row("late chunks", f"{figures.late_chunks} of {figures.chunks}")
    table.add_row("video", str(out))
    Console().print(table)


def _start(start: str | None) -> str | bytes | None:
    """A file's content if it looks like a file, else a start image's name."""
    if start is None or Path(start).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return start
    if not Path(start).is_file():
        raise ConfigError(f"--start: no file {start}, expected a PNG or JPEG picture or a start image's name")
    return Path(start).read_bytes()
