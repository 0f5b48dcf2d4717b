"""`minwm`: the command line. Commands come from the entry-point group `minwm.commands`.

Each entry point is called with the application and adds its commands. Errors that are somebody's input
(`MinwmError`) are printed as one line; anything else is a bug and shows its traceback.
"""

import os
import sys
from importlib.metadata import entry_points
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from minwm.errors import MinwmError

# Models first, then the path from data to a session; commands of other packages come after.
_ORDER = (
    "models",
    "checkpoints",
    "data",
    "train",
    "trajectories",
    "eval",
    "ablate",
    "pipelines",
    "serve",
    "play",
    "demo",
)
# What only some need is an extra: the module that is missing, and the extra that brings it.
_EXTRAS = {
    "diffusers": "published",
    "ftfy": "published",
    "huggingface_hub": "published",
    "transformers": "published",
    "vizdoom": "doom",
}


class _Path(TyperGroup):
    """Lists the commands in the order of the path."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_place)


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


def application() -> typer.Typer:
    """The application with every installed command."""
    app = typer.Typer(
        name="minwm",
        cls=_Path,
        help="Camera-controllable world models, from data to streamed session. The commands, in the order of the path:",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for point in entry_points(group="minwm.commands"):
        point.load()(app)
    return app


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidiactl") else "cpu")
    errors = Console(stderr=True, highlight=False)
    try:
        application()()
    except MinwmError as error:
        errors.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        command = f"pip install 'minwm[{_EXTRAS[error.name]}]'"
        errors.print(
            f"[bold red]error:[/] {error.name} is not installed; it comes with: {_escaped(command)}", soft_wrap=True
        )
        sys.exit(1)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
