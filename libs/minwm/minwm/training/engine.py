"""The optimizer's side of training: DeepSpeed, or plain torch in one process, behind one interface.

Master weights are float32 in both; the loop computes losses under bf16 autocast. An engine takes a
loss, later takes a step, and saves its state. It knows no stage.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.training.parallel import ParallelConfig, Processes

EngineName = Literal["auto", "torch", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up; gradients are clipped to `clip_norm`."""

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay_to: float = 1.0
    clip_norm: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`: linear warm-up, then linear to `decay_to` times the full rate."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * (1 - (1 - self.decay_to) * step / max(1, steps))


class Engine(Protocol):
    """One trained network. `name` is for people."""

    name: str

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss."""

    def step(self, learning_rate: float) -> float:
        """Update the weights, clear the gradients; the gradient norm before clipping."""

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs beside the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state, on every rank; to be copied before the next step if it is to stay."""


def make_engine(
    name: EngineName,
    network: nn.Module,
    config: OptimizerConfig,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    processes: Processes | None = None,
) -> Engine:
    """The engine asked for; `auto` takes DeepSpeed where it is installed."""
    installed = importlib.util.find_spec("deepspeed") is not None
    if name == "deepspeed" and not installed:
        raise ConfigError("engine: 'deepspeed' is not installed here; install it or choose engine: torch")
    if name == "deepspeed" or (name == "auto" and installed):
        from minwm.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(network, config)
    return TorchEngine(network, config)


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients; biases, norms and modulations are not decayed."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], config.learning_rate, config.betas, fused=True)


class TorchEngine:
    """One process, no DeepSpeed."""

    name = "torch"

    def __init__(self, network: nn.Module, config: OptimizerConfig) -> None:
        self._network, self._config = network, config
        self._optimizer = make_optimizer(network, config)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def weights(self) -> dict[str, Tensor]:
        return self._network.state_dict()
