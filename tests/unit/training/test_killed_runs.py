"""Runs that are killed: real processes, SIGKILL at any step and at every point of a checkpoint's writing."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minwm.data.clips import KIND, Clip
from minwm.data.shards import ShardWriter
from minwm.models.backbones import Backbone, save_backbone
from minwm.training.checkpointing import Checkpoints

pytestmark = pytest.mark.integration

STEPS = 24
CLOCKS = {
    "seconds",
    "step_seconds",
    "data_wait_seconds",
    "samples_per_second",
    "tokens_per_second",
    "flops_utilisation",
    "memory_bytes",
}

# Imports once and forks for every start. A start is killed from outside when the log has so many lines, or kills
# itself at the n-th call that moves or flushes a file: those of a checkpoint being written, and the old one's removal.
DRIVER = """
import json, os, shutil, signal, sys, time, traceback
from pathlib import Path
import torch
import torch._dynamo  # what the first optimizer would import
from minwm.training.recipe import load_recipe, run_recipe

def dying(function, state):
    def call(*arguments, **options):
        state["left"] -= 1
        if state["left"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def start(recipe, folder, kill):
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            if kill and kill[0] == "call":
                state = {"left": kill[1]}
                os.fsync, os.replace, shutil.rmtree = (dying(f, state) for f in (os.fsync, os.replace, shutil.rmtree))
            run_recipe(load_recipe(recipe), folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    log = folder / "log.jsonl"
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill and kill[0] == "line" and log.exists() and log.read_bytes().count(b"\\n") >= kill[1]:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)

recipe, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
ends = []
for kill in kills:
    code = start(recipe, folder / "killed", kill)
    ends.append([code, sorted(path.name for path in folder.glob("killed/checkpoints/step-*"))])
print("RESULT" + json.dumps([start(recipe, folder / "whole", None), start(recipe, folder / "killed", None), ends]))
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_backbone: Backbone, new_clips: Callable[[int, int], list[Clip]]) -> Path:
    """Consistency distillation, whose target is an average of all steps before."""
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for clip in new_clips(3, 5):
            writer.add(clip.name, clip.to_files())
    save_backbone(tmp_path / "base", tiny_backbone, {})
    run = {"steps": STEPS, "batch_size": 2, "accumulation": 2, "engine": "torch", "checkpoint_every": 2, "keep": 1}
    values: dict[str, Any] = {
        "stage": "consistency",
        "data": str(tmp_path / "data"),
        "backbone": str(tmp_path / "base"),
        "run": run,
        "optimizers": {"generator": {"learning_rate": 1e-3, "warmup_steps": 3}},
        "method": {"window": {"frames": 4}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, recipe: Path
) -> None:
    # A start's calls: 1 the log is cut; 2 the log, 3 the state, 4 its description, 5 the folder are flushed; 6 it is
    # renamed; 7 that is flushed; 8 to 13 the same for the next one, 14 whose predecessor is hidden and 15 removed.
    kills: list[list[Any]] = [["line", line] for line in random.sample(range(1, 10), 1)]
    kills += [["call", call] for call in (*random.sample(range(2, 8), 2), 14, 15)]
    random.shuffle(kills)
    arguments = [sys.executable, "-c", DRIVER, str(recipe), str(tmp_path), json.dumps(kills)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, killed, ends = json.loads(done.stdout.rpartition("RESULT")[2])
    assert (whole, killed) == (0, 0), done.stderr[-2000:]
    assert {code for code, _ in ends} <= {-9, 0}, done.stderr[-2000:]
    assert sum(code == -9 for code, _ in ends) >= 3, f"hardly any start was killed: {kills}, {ends}"
    first = next(number for number, (_, steps) in enumerate(ends) if steps)
    assert all(steps for _, steps in ends[first:]), f"after {kills} there was a moment without a checkpoint: {ends}"

    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole"), f"losses differ after {kills}"
    for name in ("model.safetensors", "config.json"):
        same = (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
        assert same, f"{name} differs after {kills}"
    one, other = (Checkpoints(tmp_path / name, 1).newest() for name in ("killed", "whole"))
    assert one is not None and other is not None and one.step == other.step == STEPS
    for network, weights in other.state["networks"].items():
        for name, value in weights.items():
            assert torch.equal(one.state["networks"][network][name], value), f"{network}.{name} after {kills}"
    for mine, others in zip(_tensors(one.state["engines"]), _tensors(other.state["engines"]), strict=True):
        assert torch.equal(mine, others), f"an optimizer's moments after {kills}"


def _tensors(state: Any) -> list[torch.Tensor]:
    """In order, however an engine nests them."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]
