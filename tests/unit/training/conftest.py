"""What the stages' tests share: a batch of random clips, and a record of what a network was asked."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Context
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw


@dataclass(frozen=True)
class Call:
    """One forward pass of a backbone, as it happened."""

    latents: Tensor
    timesteps: Tensor
    prompt: Any
    context: Context
    conditions: Conditions | None
    output: Tensor
    with_gradient: bool

    @property
    def sigma(self) -> Tensor:
        """The noise levels (b, f, 1, 1, 1) that the network was told."""
        return (self.timesteps / 1000)[:, :, None, None, None]


@pytest.fixture
def record() -> Callable[[nn.Module], list[Call]]:
    """Watch a network: the list grows by a call each time it runs."""

    def watch(network: nn.Module) -> list[Call]:
        calls: list[Call] = []

        def note(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls.append(Call(*inputs, output=output, with_gradient=torch.is_grad_enabled()))

        network.register_forward_hook(note)
        return calls

    return watch


@pytest.fixture
def draw() -> Draw:
    return Draw(seed=1, step=2, samples=range(3))


@pytest.fixture
def batch(new_clips: Callable[[int, int], list[Clip]], tiny_backbone: Backbone, draw: Draw) -> Batch:
    """Three windows of 8 latent frames."""
    return cut_windows(new_clips(3, 10), draw, WindowConfig(frames=8), tiny_backbone.encode)


@pytest.fixture(scope="session")
def launch() -> Callable[[Path, Path], list[dict[str, Any]]]:
    """Runs a script with a folder as its argument, as two processes under torchrun; what each saved there."""

    def run(script: Path, folder: Path) -> list[dict[str, Any]]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        done = subprocess.run([*torchrun, str(script), str(folder)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]

    return run


@pytest.fixture(scope="session")
def selected(request: pytest.FixtureRequest) -> Callable[[str, Sequence[str]], list[tuple[Any, ...]]]:
    """The values of some parameters that this session runs tests of a file with, each once, in order."""

    def values(file: str, names: Sequence[str]) -> list[tuple[Any, ...]]:
        specs = [getattr(item, "callspec", None) for item in request.session.items if str(item.path) == file]
        params = [spec.params for spec in specs if spec is not None and names[0] in spec.params]
        return list(dict.fromkeys(tuple(one[name] for name in names) for one in params))

    return values
