"""The command `minwm trajectories`."""

from pathlib import Path
from typing import Annotated

import typer

from minwm.progress import progress_bar


def trajectories(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/doom/trajectories.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the new dataset; must not hold one yet.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as sampling.windows=100; repeatable.")
    ] = None,
) -> None:
    """Sample an autoregressive model's ODE trajectories, the data of the stage `ode`."""
    from minwm.training.recipe import load_trajectories_recipe, run_trajectories

    loaded = load_trajectories_recipe(recipe, set_ or [])
    with progress_bar("sampling", loaded.sampling.windows) as report:
        run_trajectories(loaded, out, report)
    typer.echo(f"{loaded.sampling.windows} trajectories in {out}")
