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
from minwm.client import playback as live
from minwm.errors import ConfigError
from minwm.evaluation.report import REPORT, ReportInputs, write_report
from minwm.geometry.trajectory import parse
from minwm.progress import progress_bar
from minwm_pipelines.local import LocalRun, run_locally, world_model_arguments
from minwm_pipelines.pipeline import Cluster, make_pipeline
from minwm_pipelines.recipes import STAGES, load_recipes
from minwm_pipelines.serving import served

MODEL = "wan-doom"
TRAJECTORY = "w*2,l*3,j*4,w+l*2,s*3,a*2,d*2"
MARKER = ".minwm-demo"
VIDEO, LATENCY = "session.mp4", "latency.json"


def run_demo(out: Path, *, recipes: Path, autoencoder: Path, base: Path) -> None:
    """Run all of it; results in `out`. Raises the MinwmError of whatever went wrong."""
    console = Console(highlight=False, soft_wrap=True)
    seconds: dict[str, float] = {}
    with _timed(seconds, "all"):
        pipeline = make_pipeline(load_recipes(recipes), Cluster())
        store = out / "store"
        arguments = world_model_arguments(name=MODEL, store=store, autoencoder=autoencoder, base=base)
        _start_over(out)
        console.print("[bold]1. From game play to a registered model, as a Kubeflow pipeline on this machine")
        trained = run_locally(pipeline, arguments, out / "pipeline")
        seconds |= trained.seconds
        registry = ModelRegistry(DirectoryStore(store))
        version = registry.get(MODEL)
        console.print(f"[bold]2. A session on {MODEL}@{version.version}, played live: {TRAJECTORY}")
        playback = _serve_and_play(registry.fetch(f"{MODEL}@latest", out / "world"), out, seconds)
        console.print("[bold]3. The video and the report")
        with _timed(seconds, "Video and report"):
            _write_results(out, trained, version, playback)
    _summarize(console, out, version, playback, seconds)


def play_world(out: Path, world: Path, keys: str) -> None:
    """Serve a world that is there already and play it live; video and latencies in `out`."""
    console = Console(highlight=False, soft_wrap=True)
    parse(keys)  # before minutes of starting
    _start_over(out)
    playback = _serve_and_play(world, out, {}, keys)
    _write_session(out, playback)
    _summarize_session(console, out, playback)


def _start_over(out: Path) -> None:
    """Empty the folder, if it is an earlier demo's. Raises ConfigError when it is not."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise ConfigError(f"--out: {out} holds other files, expected a new or empty folder, or an earlier demo's")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def _serve_and_play(world: Path, out: Path, seconds: dict[str, float], keys: str = TRAJECTORY) -> live.Playback:
    steps = parse(keys)
    with ExitStack() as stack:
        with _timed(seconds, "Starting the service"), progress_bar("Starting the service", 1) as report:
            address = stack.enter_context(served(world, out / "service.log"))
            report(1)
        chunks = sum(step.count for step in steps)
        with _timed(seconds, "Playing"), progress_bar("Playing", chunks) as report:
            return asyncio.run(live.play_trajectory(address, steps, progress=lambda done, total: report(done)))


def _write_session(out: Path, playback: live.Playback) -> None:
    live.write_report(playback.report, out / LATENCY)
    with progress_bar("Writing the video", len(playback.played)) as report:
        live.write_video(playback, out / VIDEO, lambda done, total: report(done))


def _write_results(out: Path, trained: LocalRun, version: ModelVersion, playback: live.Playback) -> None:
    _write_session(out, playback)
    inputs = ReportInputs(
        title=f"{MODEL}: the demo",
        evaluation=Path(trained.outputs["evaluation"].path),
        session_video=out / VIDEO,
        latency=out / LATENCY,
        stages={stage: Path(trained.outputs[f"{stage}_record"].path) for stage in STAGES},
        registered=version,
    )
    write_report(out, inputs)


def _summarize(
    console: Console, out: Path, version: ModelVersion, playback: live.Playback, seconds: Mapping[str, float]
) -> None:
    phases = Table("phase", "seconds")
    for phase in sorted(seconds, key=lambda phase: phase == "all"):
        phases.add_row(phase, f"{seconds[phase]:.1f}")
    console.print(phases)
    margin, error = (version.metrics[name] for name in ("control_margin", "control_margin_error"))
    console.print(f"Control margin: told another clip's camera path, the loss changes by {margin:+.2%} ± {error:.2%}")
    _summarize_session(console, out, playback)
    console.print(f"[bold green]Report[/]  {out / REPORT}")


def _summarize_session(console: Console, out: Path, playback: live.Playback) -> None:
    session = playback.report
    latency = session.action_to_frame_seconds
    first, pace = session.time_to_first_frame_seconds, session.frames_per_second
    console.print(f"First frame after {first:.2f} s, then {pace:.1f} frames/s ({session.late_chunks} late chunks)")
    console.print(f"Action to frame: P50 {latency.p50:.2f} s, P95 {latency.p95:.2f} s")
    console.print(f"[bold green]Video[/]   {out / VIDEO}")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started
