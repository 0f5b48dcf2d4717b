"""DeepSpeed behind the `Engine` interface, with float32 master weights.

The loop does autocast, so DeepSpeed is told float32 and looks after the optimizer, the processes'
gradients and clipping. Under a launcher (torchrun, deepspeed) it joins the group that is there; alone,
it makes a group of one.
"""

import os
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from minwm.training.engine import OptimizerConfig, make_optimizer


class DeepSpeedEngine:
    """One network under DeepSpeed."""

    name = f"DeepSpeed {deepspeed.__version__}"

    def __init__(self, network: nn.Module, config: OptimizerConfig) -> None:
        _join_group()
        self._optimizer = make_optimizer(network, config)
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": config.clip_norm,
                "zero_optimization": {"stage": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
        )

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self._engine.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self._engine.module.state_dict()
        return weights


def _join_group() -> None:
    """Join the launcher's process group, or make a group of one."""
    # DeepSpeed would otherwise compile a C++ extension that only speeds up several CPU processes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized() and not torch.distributed.is_torchelastic_launched():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on the launcher's variable
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
