"""The command under torchrun: two processes end as one does, and a run goes on at another world size."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minwm.data.clips import KIND, Clip
from minwm.data.shards import ShardWriter
from minwm.models.backbones import Backbone, save_backbone
from minwm.training.checkpointing import Checkpoints
from minwm.training.recipe import load_recipe, run_recipe

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # three launches of the whole command

COMMAND = "from minwm.cli import main\n\nif __name__ == '__main__':\n    main()\n"


@pytest.fixture
def launch(tmp_path: Path, tiny_backbone: Backbone, new_clips: Callable[[int, int], list[Clip]]) -> Callable[..., str]:
    """Runs a recipe of four steps of DMD, in float32, in two processes; what was printed."""
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for number, clip in enumerate(new_clips(5, 5)):
            writer.add(clip.name, replace(clip, split="heldout" if number > 2 else "train").to_files())
    save_backbone(tmp_path / "base", tiny_backbone, {})
    (tmp_path / "command.py").write_text(COMMAND)
    run: dict[str, Any] = {"steps": 4, "batch_size": 4, "bf16": False, "checkpoint_every": 2, "log_every": 1}
    values = {
        "stage": "dmd",
        "data": str(tmp_path / "data"),
        "backbone": str(tmp_path / "base"),
        "run": run | {"validate_every": 2},
        "optimizers": {name: {"learning_rate": 1e-3} for name in ("generator", "critic")},
        "method": {"window": {"frames": 4}, "score": str(tmp_path / "base"), "steps": [1, 2], "critic_ratio": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def start(name: str, *overrides: str) -> str:
        arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments += [str(tmp_path / "command.py"), "train", str(tmp_path / "recipe.yaml"), "--out"]
        arguments += [str(tmp_path / name), *(part for override in overrides for part in ("--set", override))]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start


def losses_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.endswith(("loss", "grad_norm"))} for line in lines]


def test_two_processes_end_as_one_does_and_one_goes_on_from_their_checkpoint(
    tmp_path: Path, launch: Callable[..., str]
) -> None:
    spread = ["run.parallel.zero=2"] if find_spec("deepspeed") else ["run.engine=torch"]
    printed = launch("mixed", "run.steps=2", *spread)
    assert printed.count("model in") == 1 and printed.count("dmd: 2/2") == 1, "only the main process talks"
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    for folder in (one, mixed):
        run_recipe(load_recipe(tmp_path / "recipe.yaml", ["run.engine=torch"]), folder)
    assert len(losses_of(mixed)) == len(losses_of(one)) == 4
    for step, (mine, others) in enumerate(zip(losses_of(mixed), losses_of(one), strict=True)):
        assert mine == pytest.approx(others, rel=1e-3, abs=1e-5), step
    ends = [Checkpoints(folder, 1).newest() for folder in (mixed, one)]
    assert ends[0] is not None and ends[1] is not None
    for network, weights in ends[1].state["networks"].items():
        for name, value in weights.items():
            found = ends[0].state["networks"][network][name]
            torch.testing.assert_close(found, value, rtol=0, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
