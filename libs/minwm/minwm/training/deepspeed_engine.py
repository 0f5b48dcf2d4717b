"""DeepSpeed behind the `Engine` interface: ZeRO 0 to 3 with float32 master weights.

The loop does autocast and calls the network itself, so DeepSpeed is told float32 and looks after the optimizer and
the processes' gradients. Every `step` ends a step, however many losses went before it. Under a launcher the
process is in its group already (`parallel.join`); alone, it makes a group of one.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from minwm.training.engine import (
    MOMENTS,
    OptimizerConfig,
    full_weights,
    make_optimizer,
    require_state,
    start_moments,
    trained_parameters,
)
from minwm.training.parallel import ParallelConfig, part

WHOLE_BELOW = 16_384  # elements; smaller parameters stay whole under ZeRO-3: some are read outside a module's forward
BUCKET = 50_000_000  # gradients that are sent together


class DeepSpeedEngine:
    """One network under DeepSpeed."""

    name = f"DeepSpeed {deepspeed.__version__}"

    def __init__(self, network: nn.Module, config: OptimizerConfig, parallel: ParallelConfig) -> None:
        _ensure_group()
        self._network, self._config, self._zero = network, config, parallel.zero
        self._trained = trained_parameters(network)
        self._optimizer = make_optimizer(network, config)
        self._engine, self._sharding, *_ = deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": config.clip_norm if self._zero else 0.0,
                "zero_optimization": {
                    "stage": self._zero,
                    "reduce_bucket_size": BUCKET,
                    "stage3_param_persistence_threshold": WHOLE_BELOW,
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
        )
        self._norm = 0.0
        if not self._zero:  # DeepSpeed clips there too, but does not tell the norm
            self._optimizer.register_step_pre_hook(self._clip)
        start_moments(self._optimizer, self._partitions())
        if self._zero in (1, 2):  # it does so itself after the first step, which is too late to load
            self._sharding._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        if self._zero:  # what DeepSpeed's own forward does, which is not used here
            self._sharding.clear_backward_seen_flag()
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._zero else self._norm

    def state_dict(self) -> dict[str, Any]:
        step = self._optimizer.state[self._partitions()[0]]["step"]
        moments = {
            moment: {name: self._moment(parameter, moment) for name, parameter in self._trained.items()}
            for moment in MOMENTS
        }
        return {"step": int(step), **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_state(self._trained, state)
        for partition in self._partitions():
            self._optimizer.state[partition]["step"].fill_(state["step"])
        for moment in MOMENTS:
            for name, parameter in self._trained.items():
                self._set_moment(parameter, moment, state[moment][name])

    def weights(self) -> dict[str, Tensor]:
        return full_weights(self._network)

    def _clip(self, *_: Any) -> None:
        self._norm = float(nn.utils.clip_grad_norm_(self._trained.values(), self._config.clip_norm))

    def _partitions(self) -> list[Tensor]:
        """The tensors that this process's AdamW updates: parameters, or parts of many laid end to end."""
        if self._zero == 0:
            return list(self._trained.values())
        if self._zero == 3:
            return list(self._sharding.fp32_partitioned_groups_flat)
        return list(self._sharding.single_partition_of_fp32_groups)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self._zero == 0:
            return self._optimizer.state[parameter][moment]  # type: ignore[no-any-return]
        return safe_get_full_optimizer_state(parameter, moment).cpu()  # type: ignore[no-any-return]

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if self._zero == 0:
            self._optimizer.state[parameter][moment].copy_(value)
        elif self._zero == 3:  # setting it whole fails where the parts are filled up
            own = part(value, torch.distributed.get_rank(), torch.distributed.get_world_size())
            safe_set_local_optimizer_state(parameter, own, moment)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)


def _ensure_group() -> None:
    """A group of one where there is none, and DeepSpeed in it."""
    # DeepSpeed calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would otherwise compile a C++ extension that only speeds up several CPU processes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on the launcher's variable
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend)
