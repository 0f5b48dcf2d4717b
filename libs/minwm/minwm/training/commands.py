"""The command `minwm train`, and those beside it."""

from pathlib import Path
from typing import Annotated

import typer

from minwm.errors import ConfigError
from minwm.progress import progress_bar
from minwm.training.trajectory_commands import trajectories


def register(app: typer.Typer) -> None:
    """Add `train` and `trajectories` to the command line."""
    app.command(name="train")(train)
    app.command(name="trajectories")(trajectories)


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/doom/autoregressive.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. The same folder again goes on from its checkpoint.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as run.steps=100; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print shapes, parameters, memory and FLOPs of a step.")
    ] = False,
) -> None:
    """Run one training stage; the model lands in OUT/model."""
    from minwm.training.recipe import load_recipe, run_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        from rich.console import Console

        from minwm.training.dry_run import plan, tables

        Console(highlight=False).print(*tables(plan(loaded)))
        return
    if out is None:
        raise ConfigError("--out: is required to train, expected the run's folder")
    with progress_bar(loaded.stage, loaded.run.steps) as report:

        def show(done: int, total: int, figures: dict[str, float]) -> None:
            losses = (f"{name} {value:.4f}" for name, value in figures.items() if name.endswith(("loss", "psnr")))
            report(done, ", ".join(losses))

        folder = run_recipe(loaded, out, show)
    typer.echo(f"model in {folder}")
