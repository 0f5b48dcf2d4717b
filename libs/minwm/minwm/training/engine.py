"""The optimizer's side of training: DeepSpeed, or plain torch, behind one interface.

Master weights are float32 in both; the loop computes losses under bf16 autocast. An engine takes losses, later
takes a step on the mean of all processes' gradients, and saves its state, which is the same for both engines and for
any number of processes. It knows no stage. A network has its weights before its engine is made.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models.checkpoints import check_fit
from minwm.training.parallel import ParallelConfig, Processes, whole

EngineName = Literal["auto", "torch", "deepspeed"]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter, by its own names."""


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
    """One trained network. `name` is for people. All processes call every method together."""

    name: str

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the step's: parts of a batch come one by one, as parts of its mean."""

    def step(self, learning_rate: float) -> float:
        """Update the weights by the processes' mean gradients and clear those; their norm before clipping."""

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs beside the weights: `step`, and the moments by parameter."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, of any engine. Raises CheckpointError for another network's."""

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state, float32, on every rank; to be copied before the next step if it is to stay."""


def make_engine(
    name: EngineName,
    network: nn.Module,
    config: OptimizerConfig,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> Engine:
    """The engine asked for; `auto` takes DeepSpeed where it is installed."""
    installed = importlib.util.find_spec("deepspeed") is not None
    if name == "deepspeed" and not installed:
        raise ConfigError("engine: 'deepspeed' is not installed here; install it or choose engine: torch")
    if name == "deepspeed" or (name == "auto" and installed):
        from minwm.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(network, config, parallel)
    if parallel.zero:
        raise ConfigError(f"parallel.zero={parallel.zero}: expected 0, engine: torch shares nothing out")
    return TorchEngine(network, config, processes)


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients; biases, norms and modulations are not decayed."""
    trained = list(trained_parameters(network).values())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], config.learning_rate, config.betas, fused=True)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Those that want gradients, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def start_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Zero moments, as AdamW itself would make them at the first step."""
    for parameter in parameters:
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def require_state(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an engine's state is of these parameters."""
    shapes = {name: torch.empty(full_shape(parameter), device="meta") for name, parameter in parameters.items()}
    for moment in MOMENTS:
        check_fit(shapes, state[moment], where=f"the optimizer's {moment}")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that may be spread over processes (ZeRO-3)."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_weights(network: nn.Module) -> dict[str, Tensor]:
    """See `Engine.weights`."""
    weights = {name: value.detach() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        if weights[name].shape != full_shape(parameter):
            with whole([parameter]):
                weights[name] = parameter.detach().cpu().clone()
    return weights


class TorchEngine:
    """No DeepSpeed: each process keeps everything."""

    name = "torch"

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self._network, self._config, self._processes = network, config, processes
        self._trained = trained_parameters(network)
        self._optimizer = make_optimizer(network, config)
        start_moments(self._optimizer, self._trained.values())

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in self._trained.values():
            if parameter.grad is None:  # this process's losses did not reach it
                parameter.grad = torch.zeros_like(parameter)
        self._processes.average(p.grad for p in self._trained.values() if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        kept = {name: self._optimizer.state[parameter] for name, parameter in self._trained.items()}
        moments = {moment: {name: state[moment] for name, state in kept.items()} for moment in MOMENTS}
        return {"step": int(next(iter(kept.values()))["step"]), **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_state(self._trained, state)
        for name, parameter in self._trained.items():
            kept = self._optimizer.state[parameter]
            kept["step"].fill_(state["step"])
            for moment in MOMENTS:
                kept[moment].copy_(state[moment][name])

    def weights(self) -> dict[str, Tensor]:
        return full_weights(self._network)
