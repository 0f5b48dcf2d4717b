"""What a person sees of a run on this machine."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from minwm.errors import ConfigError
from minwm_pipelines.local import _Display, world_model_arguments

pytestmark = pytest.mark.unit

NOISE = "12:00:00.000 - INFO - Executing task\n    [KFP Executor INFO]: Got executor_input:\n"
SUMMARY = "Pipeline finished with status FAILURE. Inner task failed: \x1b[96m'train-stage-2'\x1b[0m."


def display(output: str) -> tuple[_Display, str, str]:
    """A display that was given this output, what it showed, and what it logged."""
    screen, log = io.StringIO(), io.StringIO()
    with _Display(Console(file=screen), log) as shown:
        shown.write(output)
    return shown, screen.getvalue(), log.getvalue()


def test_only_progress_is_shown_and_all_is_logged() -> None:
    output = f"{NOISE}    Training dmd: 3/20 loss 0.5\nuri: 1\n    Training dmd: 4/20\n"
    _, seen, logged = display(output)
    assert seen == "Training dmd: 3/20 loss 0.5\nTraining dmd: 4/20\n"
    assert logged == output


@given(st.lists(st.integers(1, 40), max_size=8))
def test_how_output_is_cut_into_writes_makes_no_difference(lengths: list[int]) -> None:
    output = f"{NOISE}    Playing: 1/2\n{NOISE}    Playing: 2/2\n"
    screen = io.StringIO()
    with _Display(Console(file=screen), io.StringIO()) as shown:
        rest = output
        for length in lengths:
            shown.write(rest[:length])
            rest = rest[length:]
        shown.write(rest)
    assert screen.getvalue() == "Playing: 1/2\nPlaying: 2/2\n"


def test_seconds_are_kept_by_step_in_order() -> None:
    shown, _, _ = display("Playing: 0/2\nPlaying: 2/2\nTraining dmd: 0/1\nTraining dmd: 1/1\n")
    assert list(shown.seconds()) == ["Playing", "Training dmd"]
    silent, _, _ = display(NOISE)
    assert silent.seconds() == {}


@pytest.mark.parametrize("prefix", ["", "    ", "    [rank0]: "])
def test_a_failure_is_the_exception_of_the_last_traceback(prefix: str) -> None:
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "    else: raise E"]
    first = [*trace, "KeyError: 'window'", "", "During handling of it:", ""]
    last = [*trace, "minwm.errors.DataError: clip a: has 8 latent frames", "Task finished"]
    shown, _, _ = display("".join(f"{prefix}{line}\n" for line in [*first, *last]))
    assert shown.failure(SUMMARY) == "the step train-stage-2 failed: DataError: clip a: has 8 latent frames"


def test_a_failure_without_a_traceback_shows_the_last_output() -> None:
    shown, _, _ = display("loading\nKilled\n\n")
    assert shown.failure(SUMMARY).endswith("train-stage-2 failed without a message; its last output: loading / Killed")


@pytest.mark.parametrize("missing", ["autoencoder", "base"])
def test_missing_starting_weights_are_named(tmp_path: Path, missing: str) -> None:
    folders = {"autoencoder": tmp_path, "base": tmp_path, missing: tmp_path / "nothing"}
    with pytest.raises(ConfigError, match=f"--{missing}: .*nothing is no folder"):
        world_model_arguments(name="doom", store=tmp_path / "store", **folders)
