"""The command `minwm eval`, and `evaluate`, which the pipeline calls too: a world measured on held-out clips.

Writes to the output folder a video and a strip per clip and, last, `eval.json`:
`world`, `dataset`, `seed`, `clips`, `control` (see ControlMargin), `psnr` (see psnr_table), `metrics`, `seconds`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minwm.errors import ConfigError, DataError
from minwm.progress import Report, progress_bar

if TYPE_CHECKING:
    from minwm.data.clips import Clip

EVALUATION = "eval.json"
CONTROL_LEVELS = 6
CONTROL_FRAMES = 8  # of a window, as in training
ROLLOUT_CHUNKS = 4  # 1.8 s of the wan-doom preset

Bars = Callable[[str, int], AbstractContextManager[Report]]
"""Opens the progress display of a task, by its title and its units of work."""


def register(app: typer.Typer) -> None:
    """Add `eval` to the command line."""
    app.command(name="eval")(evaluate_world)


def evaluate_world(
    world: Annotated[Path, typer.Argument(help="World folder: backbone, autoencoder and world.json.")],
    data: Annotated[Path, typer.Option(help="Dataset folder; its held-out clips are used.")],
    out: Annotated[Path, typer.Option(help="Folder for eval.json, videos and picture strips.")],
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips to use, at most.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 0,
) -> None:
    """Measure a world model on held-out clips: does the camera control it, how near are its frames to the true ones."""
    from rich.console import Console
    from rich.table import Table

    result = evaluate(world, data, out, clips=clips, seed=seed, bars=progress_bar)
    table = Table("PSNR in dB after", "generated", "last frame repeated", "autoencoder alone")
    for row in result["psnr"]["at"]:
        figures = (f"{row[name]:.2f}" for name in ("generated", "repeat_last", "autoencoder"))
        table.add_row(f"{row['seconds']} s", *figures)
    console = Console(highlight=False)
    console.print(table)
    console.print(result["control"]["verdict"])
    console.print(f"figures in {out / EVALUATION}")


@contextmanager
def _silent(title: str, total: int) -> Iterator[Report]:
    yield lambda done, note="": None


def evaluate(
    world_folder: Path, data: Path, out: Path, *, clips: int = 8, seed: int = 0, bars: Bars = _silent
) -> dict[str, Any]:
    """Measure a world on up to `clips` held-out clips, write the results to `out`, and return what `eval.json` holds.

    Raises ConfigError for fewer than two clips asked for, CheckpointError for a folder that is no world, DataError
    for a dataset without two held-out clips that fit the world.
    """
    if clips < 2:
        raise ConfigError(f"clips={clips}: expected at least 2, poses are exchanged between clips")
    from minwm.data.clips import load_clips
    from minwm.evaluation.control import control_margin
    from minwm.evaluation.rollouts import compare, psnr_table, write_pictures
    from minwm.models.worlds import load_world

    started = time.monotonic()
    world = load_world(world_folder)
    heldout, manifest = load_clips(data, "heldout")
    chosen = _spread(heldout, clips)
    shortest = min(len(clip.latents) for clip in chosen)
    chunk = world.backbone.config.history.chunk
    if shortest < 2 * chunk:
        raise DataError(f"{data}: a held-out clip has {shortest} latent frames, expected at least {2 * chunk}")
    out.mkdir(parents=True, exist_ok=True)
    (out / EVALUATION).unlink(missing_ok=True)  # an older one would make new pictures look complete
    with bars("control", CONTROL_LEVELS) as report:
        frames = min(CONTROL_FRAMES, shortest)
        control = control_margin(
            world.backbone, chosen, seed=seed, levels=CONTROL_LEVELS, frames=frames, progress=report
        )
    comparisons, pictures = [], []
    with bars("rollouts", len(chosen)) as report:
        for done, clip in enumerate(chosen, start=1):
            chunks = min(ROLLOUT_CHUNKS, shortest // chunk - 1)
            comparisons.append(compare(world, clip, chunks=chunks, seed=seed))
            pictures.append({"name": clip.name, **write_pictures(comparisons[-1], out, world.card.fps)})
            report(done)
    psnr = psnr_table(comparisons, world.card.fps)
    result = {
        "world": {"name": world.card.name, "steps": world.card.steps, "fps": world.card.fps},
        "dataset": manifest.digest(),
        "seed": seed,
        "clips": pictures,
        "control": {**asdict(control), "learned": control.learned, "verdict": control.verdict()},
        "psnr": psnr,
        "metrics": {
            "control_margin": control.margin,
            "control_margin_error": control.standard_error,
            **{f"psnr_{row['seconds']}s": row["generated"] for row in psnr["at"]},
        },
        "seconds": round(time.monotonic() - started, 3),
    }
    partial = out / f".{EVALUATION}.{os.getpid()}"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, out / EVALUATION)
    return result


def _spread(clips: Sequence["Clip"], count: int) -> list["Clip"]:
    """At most `count` of them, at even distances, so that every episode has its share."""
    count = min(count, len(clips))
    return [clips[place * len(clips) // count] for place in range(count)]
