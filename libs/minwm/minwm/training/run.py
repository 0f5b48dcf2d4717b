"""How a run is run: its length, batch, precision, checkpoints, data threads and where its figures go."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from minwm.errors import ConfigError
from minwm.precision import native_dtype
from minwm.training.engine import EngineName
from minwm.training.parallel import ParallelConfig

_DECIDES = ("seed", "batch_size", "bf16")  # what the numbers depend on; accumulation and the like only round otherwise


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A step sees `batch_size` samples, in `accumulation` equal parts, over all processes.

    bf16:             losses are computed under autocast on devices that multiply it quickly (minwm.precision); weights
                      stay float32
    compile:          the transformers' blocks, which takes a minute at the start
    checkpoint_activations: keep what goes into the transformers' blocks alone, and compute the rest once more
    keep:             checkpoints kept beside the best one
    resume:           exact: a checkpoint of another recipe or dataset is refused; weights: its networks and its step
                      are taken, its optimizers are not
    loaders:          threads that prepare batches ahead; 0: none, batches are prepared between steps
    cache_gb:         memory for decoded recordings; what does not fit is decoded each time
    verify_data:      compare the shards' checksums at the start, not only their sizes
    validate_every:   steps between held-out losses on up to `validate_samples` samples; 0: never
    export:           which weights become the model: of the last step, or of the lowest held-out loss
    log_every:        steps between lines where there is no terminal; 0: ten lines a run
    metrics_port:     serve Prometheus metrics there; 0 takes a free one, which the run folder's `metrics.url` tells
    peak_flops:       of one device, FLOP/s, for the utilisation; measured with a matrix product if not given
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    checkpoint_activations: bool = False
    engine: EngineName = "auto"
    parallel: ParallelConfig = ParallelConfig()
    checkpoint_every: int = 200
    keep: int = 2
    resume: Literal["exact", "weights"] = "exact"
    loaders: int = 2
    cache_gb: float = 4.0
    verify_data: bool = True
    validate_every: int = 0
    validate_samples: int = 16
    export: Literal["last", "best"] = "last"
    log_every: int = 0
    tensorboard: bool = False
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        smallest = min(self.steps, self.batch_size, self.accumulation, self.checkpoint_every)
        if smallest < 1 or self.batch_size % self.accumulation:
            raise ConfigError(
                f"run: steps={self.steps}, batch_size={self.batch_size}, accumulation={self.accumulation}, "
                f"checkpoint_every={self.checkpoint_every}: "
                "expected positive numbers and a batch that divides into the parts"
            )
        for name in ("keep", "validate_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}={getattr(self, name)}: expected at least 1")
        for name in ("loaders", "cache_gb", "validate_every", "log_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name}={getattr(self, name)}: expected 0 or more")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise ConfigError(f"run.metrics_port={self.metrics_port}: expected 0 to 65535")
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ConfigError(f"run.peak_flops={self.peak_flops}: expected a positive number of FLOP/s")
        if self.export == "best" and not self.validate_every:
            raise ConfigError("run.export='best': expected validate_every > 0, which finds the best")
        if self.export == "best" and self.parallel.zero == 3:
            raise ConfigError("run.export='best': expected parallel.zero < 3; the best checkpoint is kept all the same")

    def decides(self, device: torch.device) -> dict[str, Any]:
        """The part that decides a run's numbers; bf16: whether it is what losses are computed in on this device."""
        named = {name: value for name, value in asdict(self).items() if name in _DECIDES}
        return {**named, "bf16": self.dtype(device) is torch.bfloat16}

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """What losses are computed under."""
        return torch.autocast(device.type, torch.bfloat16) if self.dtype(device) is torch.bfloat16 else nullcontext()

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of the losses' products."""
        return native_dtype(device) if self.bf16 else torch.float32
