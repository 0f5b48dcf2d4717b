"""The command line as a user meets it: help in the order of the path, errors in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def minwm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from minwm.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands_in_the_order_of_the_path() -> None:
    text = minwm("--help").stdout
    places = [text.index(f"│ {name} ") for name in ("data", "train", "eval", "pipelines", "serve", "play", "demo")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "{tmp}/none.yaml", "--out", "{tmp}/run"), "none.yaml: no such recipe"),
        (("train", "{tmp}/typo.yaml", "--out", "{tmp}/run"), "stpes: unknown key, did you mean 'steps'?"),
        (("trajectories", "{tmp}/typo.yaml", "--out", "{tmp}/shards"), "stage: unknown key"),
        (("data", "record", "--out", "{tmp}/data", "--scene", "freedoom1:E9M9"), "freedoom1:E9M9"),
        (("data", "build", "{tmp}", "--out", "{tmp}/clips"), "not a dataset"),
        (("eval", "{tmp}", "--data", "{tmp}", "--out", "{tmp}/eval"), "not a world model"),
        (("serve", "--model", "{tmp}"), "not a world model"),
        (("play", "w*4,x*2", "--out", "{tmp}/session.mp4"), "'x'"),
        (("play", "w*4", "--out", "{tmp}/session.mp4", "--address", "127.0.0.1:1"), "127.0.0.1:1"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_leaves_nothing(
    arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    (tmp_path / "typo.yaml").write_text(
        "stage: autoregressive\ndata: d\nbackbone: b\nrun: {stpes: 3, batch_size: 1}\noptimizers: {}\n"
    )
    done = minwm(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["typo.yaml"]
