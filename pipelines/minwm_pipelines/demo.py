"""The demo: game play to a world model that is served and played live, with a video and a report to look at.

Knows the order of things and no details: the pipeline makes and registers the model, `minwm serve` serves it,
the client plays it.
"""

import asyncio
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minwm.artifacts.registry import ModelRegistry, ModelVersion
from minwm.artifacts.store import DirectoryStore
from minwm.client.playback import Playback, play_trajectory, write_report, write_video
from minwm.errors import ConfigError
from minwm.geometry.trajectory import parse
from minwm.progress import progress_bar
from minwm_pipelines.local import run_locally, world_model_arguments
from minwm_pipelines.pipeline import Cluster, make_pipeline
from minwm_pipelines.recipes import load_recipes
from minwm_pipelines.serving import served

MODEL = "wan-doom"
TRAJECTORY = "w*6,w+l*4,d*3,w*4,a*2,w+j*4"
MARKER = ".minwm-demo"
VIDEO, LATENCY = "session.mp4", "latency.json"


def run_demo(out: Path, *, recipes: Path, autoencoder: Path, base: Path) -> None:
    """Run all of it; results in `out`. Raises the MinwmError of whatever went wrong."""
    console = Console(highlight=False)
    pipeline = make_pipeline(load_recipes(recipes), Cluster())
    store = out / "store"
    arguments = world_model_arguments(name=MODEL, store=store, autoencoder=autoencoder, base=base)
    _start_over(out)
    console.print("[bold]1. Game play, four training stages, evaluation: a Kubeflow pipeline on this machine")
    trained = run_locally(pipeline, arguments, out / "pipeline")
    seconds = dict(trained.seconds)
    registry = ModelRegistry(DirectoryStore(store))
    version = registry.get(MODEL)
    console.print(f"[bold]2. A session on {MODEL}@{version.version}, played live: {TRAJECTORY}")
    playback = _serve_and_play(registry.fetch(f"{MODEL}@{version.version}", out / "world"), out, seconds)
    console.print("[bold]3. Results")
    with _timed(seconds, "Writing the video"), progress_bar("Writing the video", len(playback.played)) as report:
        write_video(playback, out / VIDEO, lambda done, total: report(done))
    write_report(playback.report, out / LATENCY)
    _summarize(console, out, version, playback, seconds)


def _start_over(out: Path) -> None:
    """Empty the folder, if it is an earlier demo's. Raises ConfigError when it is not."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise ConfigError(f"--out: {out} holds other files, expected a new or empty folder, or an earlier demo's")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def _serve_and_play(world: Path, out: Path, seconds: dict[str, float]) -> Playback:
    steps = parse(TRAJECTORY)
    with ExitStack() as stack:
        with _timed(seconds, "Starting the service"), progress_bar("Starting the service", 1) as report:
            address = stack.enter_context(served(world, out / "service.log"))
            report(1)
        chunks = sum(step.count for step in steps)
        with _timed(seconds, "Playing"), progress_bar("Playing", chunks) as report:
            return asyncio.run(play_trajectory(address, steps, progress=lambda done, total: report(done)))


def _summarize(
    console: Console, out: Path, version: ModelVersion, playback: Playback, seconds: Mapping[str, float]
) -> None:
    phases = Table("phase", "seconds")
    for phase, duration in seconds.items():
        phases.add_row(phase, f"{duration:.1f}")
    phases.add_row("all", f"{sum(seconds.values()):.1f}", style="bold")
    console.print(phases)
    metrics, played = version.metrics, playback.report
    margin, error = metrics["control_margin"], metrics["control_margin_error"]
    console.print(f"control margin: {margin:+.2%} ± {error:.2%} higher loss with another clip's camera path")
    latency = played.action_to_frame_seconds
    console.print(
        f"first frame after {played.time_to_first_frame_seconds:.2f} s, {played.frames_per_second:.1f} frames/s"
    )
    console.print(f"action to frame: P50 {latency.p50:.2f} s, P95 {latency.p95:.2f} s")
    console.print(f"[bold green]video[/]  {out / VIDEO}")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started
