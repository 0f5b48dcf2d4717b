"""What a step came to, and where its figures go: `log.jsonl`, TensorBoard, Prometheus.

Tokens are those of the latent frames that the trained samples have, not how often a method passes them through a
network; utilisation is the model's FLOPs per second over the device's peak.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from minwm.errors import ConfigError
from minwm.training.run import RunConfig

LOG, TENSORBOARD, METRICS_URL = "log.jsonl", "tensorboard", "metrics.url"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step of the whole batch comes to: latent tokens, and FLOPs, forward and backward, where known."""

    tokens: int
    flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one step. networks: loss, gradient norm, … of each. stage: the method's own. pace: speed, memory, waiting."""

    networks: dict[str, dict[str, float]] = field(default_factory=dict)
    stage: dict[str, float] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """`generator_loss` and the like."""
        networks = {f"{name}_{key}": value for name, of in self.networks.items() for key, value in of.items()}
        return {**networks, **self.stage, **self.pace}


class Pace:
    """Speed and memory of the steps since it was made."""

    def __init__(self, run: RunConfig, work: Work | None, device: torch.device, world: int) -> None:
        self._batch, self._work, self._device = run.batch_size, work, device
        self._peak = 0.0
        if work is not None and work.flops is not None:
            self._peak = world * (run.peak_flops or matmul_flops(device, run.dtype(device)))
        self._since = time.perf_counter()

    def of_step(self, data_wait: float) -> dict[str, float]:
        """Figures of the step that ends now, which waited `data_wait` seconds for its batch."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        figures = {"step_seconds": seconds, "data_wait_seconds": data_wait, "samples_per_second": self._batch / seconds}
        if self._work is not None:
            figures["tokens_per_second"] = self._work.tokens / seconds
            if self._work.flops is not None:
                figures["flops_utilisation"] = self._work.flops / seconds / self._peak
        figures["memory_bytes"] = float(_resident_bytes())
        if self._device.type == "cuda":
            figures["cuda_memory_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        return figures


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product on this device, the best of a few."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class Sink(Protocol):
    """A place that figures go to."""

    def write(self, step: int, figures: Figures) -> None:
        """Take the figures of step number `step`, from 0."""

    def close(self) -> None:
        """Nothing comes any more."""


class Journal:
    """The run's sinks. A run that goes on cuts the log after the `done` steps that need not be done again."""

    def __init__(self, folder: Path, run: RunConfig, done: int) -> None:
        self._log = _Log(folder / LOG, done)
        self._sinks: list[Sink] = [self._log]
        with ExitStack() as undo:
            undo.callback(self.close)
            if run.tensorboard:
                self._sinks.append(TensorBoard(folder / TENSORBOARD, done))
            if run.metrics_port is not None:
                served = Prometheus(run.batch_size, run.metrics_host, run.metrics_port)
                self._sinks.append(served)
                (folder / METRICS_URL).write_text(served.url + "\n")
            undo.pop_all()

    def write(self, step: int, figures: Figures) -> None:
        """Tell every sink."""
        for sink in self._sinks:
            sink.write(step, figures)

    def flush(self) -> None:
        """What was written stays, whatever happens to the machine."""
        self._log.flush()

    def close(self) -> None:
        """Close every sink."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Log:
    """A JSON line per step; `seconds` counts on where an earlier start of the run stopped."""

    def __init__(self, path: Path, done: int) -> None:
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")][:done] if path.is_file() else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in lines))
        os.replace(partial, path)
        self._file = path.open("a")
        self._started = time.monotonic() - (json.loads(lines[-1])["seconds"] if lines else 0.0)

    def write(self, step: int, figures: Figures) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps({"step": step, **figures.flat(), "seconds": seconds}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files. Raises ConfigError where the package is not installed."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "run.tensorboard=True: tensorboard is not installed; it comes with: pip install 'minwm[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=done)

    def write(self, step: int, figures: Figures) -> None:
        """A scalar per figure, grouped as the figures are."""
        groups = {**figures.networks, "stage": figures.stage, "pace": figures.pace}
        for group, values in groups.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Prometheus:
    """`minwm_training_*` of this run over HTTP, from a registry of its own. `url` is where.

    Raises ConfigError where the client is not installed or the port is taken.
    """

    def __init__(self, batch_size: int, host: str, port: int) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                "run.metrics_port: prometheus-client is not installed; it comes with: pip install 'minwm[metrics]'"
            ) from error
        self._batch_size = batch_size
        registry = prometheus.CollectorRegistry()
        prefix = "minwm_training_"
        self._steps = prometheus.Gauge(f"{prefix}steps_done", "Steps done", registry=registry)
        self._samples = prometheus.Counter(f"{prefix}samples", "Samples trained on", registry=registry)
        self._waited = prometheus.Counter(f"{prefix}data_wait_seconds", "Spent waiting for data", registry=registry)
        self._networks = {
            key: prometheus.Gauge(f"{prefix}{key}", about, ["network"], registry=registry)
            for key, about in _OF_NETWORKS.items()
        }
        self._stage = prometheus.Gauge(f"{prefix}stage_figure", "The method's own", ["figure"], registry=registry)
        self._pace = {
            key: prometheus.Gauge(f"{prefix}{name}", about, registry=registry)
            for key, (name, about) in _OF_PACE.items()
        }
        try:
            self._server, self._thread = prometheus.start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(f"run.metrics_port={port}: cannot be served on {host} ({error})") from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def write(self, step: int, figures: Figures) -> None:
        """Set the gauges to the step's figures."""
        self._steps.set(step + 1)
        self._samples.inc(self._batch_size)
        self._waited.inc(figures.pace["data_wait_seconds"])
        for network, values in figures.networks.items():
            for key, value in values.items():
                self._networks[key].labels(network).set(value)
        for name, value in figures.stage.items():
            self._stage.labels(name).set(value)
        for key, gauge in self._pace.items():
            if key in figures.pace:
                gauge.set(figures.pace[key])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


_OF_NETWORKS = {
    "loss": "Training loss",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "heldout_loss": "Loss on held-out samples",
}
_OF_PACE = {
    "step_seconds": ("step_seconds", "Duration of the last step"),
    "samples_per_second": ("samples_per_second", "Samples per second"),
    "tokens_per_second": ("tokens_per_second", "Latent tokens per second"),
    "flops_utilisation": ("flops_utilisation_ratio", "The model's FLOPs over the device's peak"),
    "memory_bytes": ("resident_memory_bytes", "Memory of the process"),
    "cuda_memory_bytes": ("cuda_memory_bytes", "Most memory allocated on the GPU"),
}


def summary(figures: Mapping[str, float]) -> str:
    """A line for people: losses, speed, waiting."""
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("samples_per_second", "samples/s", lambda value: f"{value:.3g}"),
        ("tokens_per_second", "tokens/s", lambda value: f"{value:.3g}"),
        ("flops_utilisation", "of the peak", lambda value: f"{100 * value:.0f} %"),
        ("data_wait_seconds", "s for data", lambda value: f"{value:.2f}"),
    ]
    losses = [f"{name} {value:.4f}" for name, value in figures.items() if name.endswith(("loss", "psnr"))]
    return ", ".join(losses + [f"{form(figures[name])} {unit}" for name, unit, form in shown if name in figures])


def _resident_bytes() -> int:
    """The most memory that the process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
