"""The command `minwm train`, and those beside it."""

from pathlib import Path
from typing import Annotated

import typer

from minwm.progress import progress_bar
from minwm.training.trajectory_commands import trajectories


def register(app: typer.Typer) -> None:
    """Add `train` and `trajectories` to the command line."""
    app.command(name="train")(train)
    app.command(name="trajectories")(trajectories)


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/doom/autoregressive.yaml.")],
    out: Annotated[Path, typer.Option(help="Run folder. The same folder again goes on from its checkpoint.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as run.steps=100; repeatable.")
    ] = None,
) -> None:
    """Run one training stage; the model lands in OUT/model."""
    from minwm.training.recipe import load_recipe, run_recipe

    loaded = load_recipe(recipe, set_ or [])
    with progress_bar(loaded.stage, loaded.run.steps) as report:

        def show(done: int, total: int, figures: dict[str, float]) -> None:
            losses = (f"{name} {value:.4f}" for name, value in figures.items() if name.endswith(("loss", "psnr")))
            report(done, ", ".join(losses))

        folder = run_recipe(loaded, out, show)
    typer.echo(f"model in {folder}")
