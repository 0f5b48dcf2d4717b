"""How fast training data comes: samples per second of the loader alone, beside what a training run took.

    python benchmarks/loader.py runs/demo/data --run runs/demo/autoregressive

Reads clips from their shards by number, cuts windows and makes batches, as the loop has them made, with no step to
compute in between.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from minwm.data.clips import KIND, ClipReader
from minwm.data.shards import ShardReader
from minwm.models.text import byte_tokens
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw
from minwm.training.loader import Loader
from minwm.training.parallel import Processes
from minwm.training.run import RunConfig


class Windows:
    """What the backbone stages do with clips before a step."""

    def __init__(self, frames: int) -> None:
        self._window = WindowConfig(frames=frames)

    def prepare(self, samples: list[Any], draw: Draw) -> Batch:
        """A window of each clip, its prompt as bytes."""
        return cut_windows(samples, draw, self._window, lambda prompts: byte_tokens(prompts, 64))


def samples_per_second(clips: ClipReader, frames: int, batch: int, steps: int, threads: int) -> float:
    """Of `steps` batches that nobody keeps."""
    run = RunConfig(steps=steps, batch_size=batch, loaders=threads)
    with Loader(Windows(frames), clips, run, Processes()) as loader:
        started = time.perf_counter()
        for _ in loader.steps(0):
            pass
        return steps * batch / (time.perf_counter() - started)


def main(
    data: Annotated[Path, typer.Argument(help="A dataset of clips.")],
    frames: Annotated[int, typer.Option(help="Latent frames of a window.")] = 8,
    batch: Annotated[int, typer.Option(help="Samples of a batch.")] = 8,
    steps: Annotated[int, typer.Option(help="Batches timed.")] = 50,
    run: Annotated[Path | None, typer.Option(help="Folder of a training run to compare with.")] = None,
) -> None:
    """Time the loader."""
    console = Console()
    clips = ClipReader(ShardReader(data, KIND), "train")
    console.print(f"{len(clips)} clips, windows of {frames} latent frames, batches of {batch}")
    for threads in (0, 1, 2):
        rate = samples_per_second(clips, frames, batch, steps, threads)
        console.print(f"loader, {threads} threads: {rate:8.1f} samples/s", highlight=False)
    if run is not None:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rate, waited, took = (
            statistics.median(line[name] for line in lines)
            for name in ("samples_per_second", "data_wait_seconds", "step_seconds")
        )
        share = f"waiting for data {1000 * waited:.1f} ms of {1000 * took:.0f} ms a step"
        console.print(f"training:          {rate:8.1f} samples/s, {share}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
