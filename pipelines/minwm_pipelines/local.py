"""The pipeline on this machine: the components one after another, each in a process of its own.

Kubeflow's local runner prints everything it does; that goes to `pipeline.log`. A person sees a bar for
each step, or, where there is no terminal, the lines in which the components report their progress.
"""

import io
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from kfp import local
from kfp.dsl.graph_component import GraphComponent
from kfp.local.config import LocalExecutionConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from minwm.errors import ConfigError, MinwmError

LOG = "pipeline.log"
_PROGRESS = re.compile(r"\s*(\w[\w ]*): (\d+)/(\d+)(?: .*)?$")
_COLOUR = re.compile(r"\x1b\[\d+m")
_TRACE = "Traceback (most recent call last)"
_MODULE = re.compile(r"^(\w+\.)+(?=\w+(:|$))")


class PipelineError(MinwmError):
    """A step of the pipeline failed."""


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """The pipeline's outputs by name (artifacts have a `path`), and the seconds that each step took."""

    outputs: Mapping[str, Any]
    seconds: Mapping[str, float]


def run_locally(pipeline: GraphComponent, arguments: Mapping[str, Any], folder: Path) -> LocalRun:
    """Run the pipeline; everything it makes lies under `folder`.

    Raises PipelineError with the message of the step that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("w") as log, _Display(Console(file=sys.stdout), log) as display:
        with redirect_stdout(display), _local_runner(folder):
            try:
                task = pipeline(**arguments)
            except RuntimeError as error:
                raise PipelineError(f"{display.failure(str(error))}; all its output is in {folder / LOG}") from error
        return LocalRun(outputs=dict(task.outputs), seconds=display.seconds())


def world_model_arguments(*, name: str, store: Path, autoencoder: Path, base: Path, clips: int = 8) -> dict[str, Any]:
    """The pipeline's arguments for folders on this machine. Raises ConfigError, naming the one that is missing."""
    for option, folder in (("autoencoder", autoencoder), ("base", base)):
        if not folder.is_dir():
            raise ConfigError(f"--{option}: {folder} is no folder, expected one with a model's weights")
    return {
        "name": name,
        "store": str(store.absolute()),
        "autoencoder": str(autoencoder.absolute()),
        "base": str(base.absolute()),
        "evaluation_clips": clips,
    }


@contextmanager
def _local_runner(root: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        # What is said of clusters' settings that have no effect here, and of images whose name lacks "python".
        warnings.filterwarnings("ignore", ".* have no effect in the current local runner", UserWarning)
        warnings.filterwarnings("ignore", "You may be attemping to run a task", RuntimeWarning)
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
        try:
            yield
        finally:
            LocalExecutionConfig.instance = None


class _Display(io.TextIOBase):
    """Standard output of a run: writes all of it to the log, and shows the lines that report progress."""

    def __init__(self, console: Console, log: TextIO) -> None:
        self._console, self._log = console, log
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(
            *columns, console=console, redirect_stdout=False, redirect_stderr=False, disable=not console.is_terminal
        )
        self._line = ""
        self._lines: list[str] = []
        self._bar: tuple[str, TaskID] | None = None
        self._started: dict[str, float] = {}

    def __enter__(self) -> "_Display":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._log.write(text)
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._lines.append(line)
            if match := _PROGRESS.match(line):
                title, done, total = match.groups()
                self._show(title, int(done), int(total))
                if not self._console.is_terminal:
                    self._console.print(line.strip(), highlight=False)
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def seconds(self) -> dict[str, float]:
        """How long each step took, until the next one began or until now."""
        moments = [*self._started.values(), time.monotonic()]
        return {title: end - start for title, (start, end) in zip(self._started, pairwise(moments), strict=True)}

    def failure(self, summary: str) -> str:
        """What to tell a person: the step, and the exception at the end of its last traceback."""
        named = re.search(r"Inner task failed: '([\w-]+)'", _COLOUR.sub("", summary))
        step = f"the step {named.group(1)}" if named else "a step"
        traces = [number for number, line in enumerate(self._lines) if _TRACE in line]
        for line in self._lines[traces[-1] + 1 :] if traces else ():
            # A traceback's frames are indented, its exception is not; all of it may have a prefix ("[rank0]: ").
            margin = self._lines[traces[-1]].index(_TRACE)
            if line[margin:].strip() and not line[margin].isspace():
                return f"{step} failed: {_MODULE.sub('', line[margin:])}"
        tail = " / ".join(line.strip() for line in self._lines[-12:] if line.strip())
        return f"{step} failed without a message; its last output: {tail}"

    def _show(self, title: str, done: int, total: int) -> None:
        if self._bar is None or self._bar[0] != title:
            self._started[title] = time.monotonic()
            self._bar = title, self._bars.add_task(title, total=total)
        self._bars.update(self._bar[1], completed=done, total=total)
