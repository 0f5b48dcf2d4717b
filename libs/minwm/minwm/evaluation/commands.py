"""The command `minwm eval`: a world, or a backbone with its autoencoder, measured on held-out clips.

OUT holds pictures and everything found (`eval.json`); beside it lie `OUT.html`, the page, and `OUT.json`, the figures
that decisions are taken on, each with its value and the clips behind it.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minwm.errors import ConfigError
from minwm.evaluation.ablation_commands import ablate
from minwm.progress import progress_bar

if TYPE_CHECKING:
    from minwm.evaluation.measures import Critics
    from minwm.evaluation.teacher import TeacherRecord
    from minwm.models.backbones import Backbone


def register(app: typer.Typer) -> None:
    """Add `eval` and `ablate` to the command line."""
    app.command(name="eval")(evaluate_world)
    app.command(name="ablate")(ablate)


def evaluate_world(
    world: Annotated[Path, typer.Argument(help="World folder, or a backbone's with --autoencoder.")],
    data: Annotated[Path, typer.Option(help="Dataset folder; its held-out clips are used.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures; OUT.html and OUT.json are written beside it.")],
    autoencoder: Annotated[Path | None, typer.Option(help="Autoencoder folder, where WORLD is a backbone's.")] = None,
    judge: Annotated[Path | None, typer.Option(help="Folder of the network that sees motion and compares.")] = None,
    features: Annotated[
        str | None, typer.Option(help="module:function that makes another FeatureExtractor than the judge.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Many-step teacher: backbone folder, or its record.")] = None,
    base: Annotated[Path | None, typer.Option(help="Bidirectional backbone folder, to time.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Long walks and speed too; more and longer clips.")] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the world's own, or 4, if not given.")] = None,
    clips: Annotated[int | None, typer.Option(help="Held-out clips to use, at most.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Of rollouts along the clips' true paths.")] = None,
    long_clips: Annotated[int | None, typer.Option(help="Clips from which long walks start.")] = None,
    long_seconds: Annotated[float | None, typer.Option(help="Of long walks.")] = None,
    long_data: Annotated[
        Path | None, typer.Option(help="Dataset of clips that last as long; shorter ones go on by scripted keys.")
    ] = None,
    teacher_clips: Annotated[int | None, typer.Option(help="Clips that the teacher rolls out, at most.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(help="Steps that the teacher takes.")] = None,
    teacher_guidance: Annotated[float | None, typer.Option(help="Of the teacher by its prompt; 1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Play VizDoom, once, into a folder under DATA.")] = False,
    scene: Annotated[list[str] | None, typer.Option(help="With --record: wad:map; repeatable.")] = None,
    size: Annotated[str, typer.Option(help="With --record and a backbone: pixels, HEIGHTxWIDTH.")] = "96x128",
) -> None:
    """Measure a world model on held-out clips: does the camera control it, how near are its frames to the true ones."""
    from minwm.evaluation.evaluate import FULL, EvaluationConfig, evaluate, write_json
    from minwm.evaluation.heldout import HeldoutConfig, open_world, record_heldout
    from minwm.evaluation.page import write_page
    from minwm.memory import keep_freed_memory
    from minwm.models.backbones import load_backbone
    from minwm.precision import native_dtype

    keep_freed_memory()
    asked = {
        "clips": clips,
        "seconds": seconds,
        "long_clips": long_clips,
        "long_seconds": long_seconds,
        "teacher_clips": teacher_clips,
        "teacher_steps": teacher_steps,
        "teacher_guidance": teacher_guidance,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config = replace(FULL if full else EvaluationConfig(), **given)
    if record:
        heldout = HeldoutConfig(size=_size(size))
        heldout = replace(heldout, scenes=tuple(scene)) if scene else heldout
        folder, data = data, record_heldout(data, world, autoencoder, heldout, progress_bar)
        if config.long_clips and long_data is None:
            lasting = heldout.lasting(config.long_seconds)
            long_data = record_heldout(folder, world, autoencoder, lasting, progress_bar)
    result = evaluate(
        open_world(world, autoencoder, data, steps),
        data,
        out,
        config,
        critics=_critics(judge, features),
        teacher=None if teacher is None else _teacher(teacher),
        base=None if base is None else load_backbone(base, native_dtype()),
        long_data=long_data,
        bars=progress_bar,
    )
    write_page(out.with_name(f"{out.name}.html"), result, out)
    write_json(out.with_name(f"{out.name}.json"), result["figures"])
    _print(result, out)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 144x192")
    return int(height), int(width)


def _critics(judge: Path | None, features: str | None) -> "Critics":
    """The judge as both critics, or another extractor in its place as the second; named by its weights."""
    import hashlib
    import importlib

    from minwm.evaluation.judge import load_judge
    from minwm.evaluation.measures import Critics
    from minwm.models.checkpoints import WEIGHTS

    seen = None if judge is None else load_judge(judge)
    name = "" if judge is None else hashlib.sha256((judge / WEIGHTS).read_bytes()).hexdigest()
    if features is None:
        return Critics(name=name, motion=seen, features=seen)
    module, _, function = features.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--features {features}: expected module:function ({error})") from error
    return Critics(name=f"{name} {features}", motion=seen, features=make())


def _teacher(path: Path) -> "Backbone | TeacherRecord":
    from minwm.evaluation.teacher import load_teacher
    from minwm.models.backbones import load_backbone
    from minwm.precision import native_dtype

    return load_backbone(path, native_dtype()) if path.is_dir() else load_teacher(path)


def _print(result: dict[str, Any], out: Path) -> None:
    """The figures that matter most, at a glance."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "clips")
    for name, figure in result["figures"].items():
        value = figure["value"]
        table.add_row(name, figure["missing"] if value is None else f"{value:.4g}", str(figure.get("clips", "")))
    console = Console(highlight=False)
    console.print(table)
    console.print(result["control"]["verdict"])
    console.print(f"page in {out}.html, figures in {out}.json")
