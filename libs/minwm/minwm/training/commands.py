"""The command `minwm train`, and those beside it."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from minwm.errors import ConfigError
from minwm.progress import Report, progress_bar
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
    from minwm.training.metrics import summary
    from minwm.training.recipe import load_recipe, run_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        from rich.console import Console

        from minwm.training.dry_run import plan, tables

        Console(highlight=False).print(*tables(plan(loaded)))
        return
    if out is None:
        raise ConfigError("--out: is required to train, expected the run's folder")
    with ExitStack() as bars:

        def show(done: int, total: int, figures: dict[str, float]) -> None:
            if not shown:  # the bar begins with the first step: only the main process takes part in it
                shown.append(bars.enter_context(progress_bar(loaded.stage, total, loaded.run.log_every)))
            shown[0](done, summary(figures))

        shown: list[Report] = []
        folder = run_recipe(loaded, out, show)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"model in {folder}")
