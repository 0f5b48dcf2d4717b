"""The command `minwm ablate`."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minwm.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table


def ablate(
    ablation: Annotated[Path, typer.Argument(help="Such as recipes/doom/ablations/pose_noise.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and results; the same again goes on.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override in every recipe, such as data=runs/clips; repeatable.")
    ] = None,
) -> None:
    """Train what differs in one choice, several seeds of each, and see what it does to camera control."""
    from rich.console import Console

    from minwm.evaluation.ablation import run_ablation

    result = run_ablation(ablation, out, set_ or [], progress_bar)
    picture = out / f"{ablation.stem}.svg"
    picture.write_text(_picture(ablation.stem, result["curves"]))
    console = Console(highlight=False)
    console.print(_table(result))
    for one in result["comparisons"]:
        console.print(one["verdict"])
    console.print(f"figures in {out / ablation.stem}.json, curves in {picture}")


def _margins(seeds: Mapping[int, Mapping[int, Mapping[str, Any]]], steps: int) -> list[float]:
    return [margins[steps]["margin"] for margins in seeds.values()]


def _table(result: Mapping[str, Any]) -> "Table":
    """Mean margin ± standard deviation over the seeds, by arm and steps."""
    from rich.table import Table

    asked = result["asked"]
    table = Table("arm", *(f"{steps} steps" for steps in asked["steps"]), title=asked["title"])
    for arm, seeds in result["curves"].items():
        cells = []
        for steps in asked["steps"]:
            margins = _margins(seeds, steps)
            spread = f" ± {statistics.stdev(margins):.1%}" if len(margins) > 1 else ""
            cells.append(f"{statistics.mean(margins):+.1%}{spread}")
        table.add_row(arm, *cells)
    return table


def _picture(name: str, curves: Mapping[str, Any]) -> str:
    """Mean margins over steps as SVG."""
    from minwm.evaluation.plots import Axes, plot

    lines = []
    for arm, seeds in curves.items():
        steps = list(next(iter(seeds.values())))
        lines.append((arm, steps, [100 * statistics.mean(_margins(seeds, count)) for count in steps]))
    return plot(name, [Axes("training steps", "control margin, %", lines)])
