"""The session service as a Ray Serve deployment behind Ray's own gRPC ingress, and its start and stop.

One replica holds one engine and many sessions. `running_service` is the way in for tests and the demo.
"""

import logging
import os
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch
from prometheus_client import CollectorRegistry, start_http_server
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.config import gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from minwm.client.v1 import session_pb2 as pb
from minwm.errors import ConfigError, SessionError
from minwm.memory import KEEP_FREED
from minwm.models.worlds import load_world
from minwm.streaming import StreamingEngine
from minwm_session.errors import to_status
from minwm_session.host import SessionHost
from minwm_session.interact import interact

APPLICATION = "session"
STATUS_DETAILS = "grpc-status-details-bin"
# Threads wait for each other in a busy loop, which is quick, but takes the core from the very thread that they wait for
# where clients, encoders and Ray want the cores as well: for about a tenth of a millisecond, then, and no longer.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", **KEEP_FREED}
_SERVICER = "minwm.client.v1.session_pb2_grpc.add_SessionServiceServicer_to_server"


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What to serve, and where.

    metrics_port: None: no metrics end point
    device:       that the model runs on, `cpu` or `cuda`
    threads:      that it computes with on a CPU
    compiled:     passes at full windows, which takes up to a minute before it is ready, and a C++ compiler on CPUs
    """

    model: Path
    port: int = 9000
    slots: int = 2
    metrics_port: int | None = 9090
    idle_seconds: float = 60.0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = os.cpu_count() or 1
    compiled: bool = False

    def __post_init__(self) -> None:
        if not self.model.is_dir():
            raise ConfigError(f"model: {self.model} is no folder, expected an exported model")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: cuda, expected cpu: PyTorch sees no GPU here")
        for name in ("slots", "idle_seconds", "threads"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected a positive number")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 < port < 65536:
                raise ConfigError(f"{name}: {port}, expected 1 to 65535")
        if self.port == self.metrics_port:
            raise ConfigError(f"metrics_port: {self.metrics_port} is the gRPC port too, expected another")


class SessionService:
    """One replica. Its methods are those of `minwm.session.v1.SessionService`."""

    def __init__(self, config: ServiceConfig) -> None:
        registry = CollectorRegistry()
        self._host = SessionHost(lambda: _engine(config), idle_seconds=config.idle_seconds, registry=registry)
        self._host.warm_up()
        if config.metrics_port is not None:
            start_http_server(config.metrics_port, registry=registry)

    async def Interact(
        self, request_stream: gRPCInputStream[pb.ClientEvent], grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.ServerEvent, None]:
        """One session."""
        async with aclosing(interact(self._host, _events(request_stream))) as events:
            try:
                async for event in events:
                    yield event
            except Exception as error:
                code, status = to_status(error)
                # Ray Serve carries code and trailers to the client with a message only, never with an exception.
                grpc_context.set_code(code)
                grpc_context.set_details(status.message)
                grpc_context.set_trailing_metadata([(STATUS_DETAILS, status.SerializeToString())])
                yield pb.ServerEvent(ended=pb.Ended(reason=pb.END_REASON_ERROR))

    async def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """The one model of this service."""
        return pb.ListModelsResponse(models=[self._host.describe_model()])


def _engine(config: ServiceConfig) -> StreamingEngine:
    torch.set_num_threads(config.threads)  # of the thread that this runs on; Ray limits a replica to one
    return StreamingEngine(load_world(config.model, device=config.device), config.slots, compiled=config.compiled)


async def _events(stream: gRPCInputStream[pb.ClientEvent]) -> AsyncGenerator[pb.ClientEvent, None]:
    """The client's events, to the end of the stream, however it comes.

    When a client is lost, Ray Serve may cancel `Interact`, or only fail or end its input, the same as if the
    client had ended it.
    """
    with suppress(TaskCancelledError):
        async for event in stream:
            yield event


def start(config: ServiceConfig) -> None:
    """Start Ray on this machine and the service in it; returns when it is ready.

    Raises ConfigError for a port in use, what `load_world` raises, SessionError when Ray or the replica does not
    come up.
    """
    for name, port in (("port", config.port), ("metrics_port", config.metrics_port)):
        if port is not None and _in_use(port):
            raise ConfigError(f"{name}: {port} is in use, expected a free port")
    load_world(config.model)  # refuses a damaged model before Ray takes its half minute
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 1024**2,
        )
        serve.start(
            http_options={"port": free_port()},  # Serve has no way to leave HTTP out
            grpc_options=gRPCOptions(port=config.port, grpc_servicer_functions=[_SERVICER]),
        )
        serve.run(_application(config), name=APPLICATION)
    except Exception as error:
        stop()
        *_, reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SessionError(f"Ray Serve did not come up with {config.model}: {reason}") from error
    except BaseException:  # Ctrl-C while starting
        stop()
        raise


def stop() -> None:
    """Stop the service and its Ray; harmless when nothing runs."""
    if ray.is_initialized():
        ray.shutdown()  # all of it is ours; serve.shutdown() first would print an error of Ray's controller


@contextmanager
def running_service(config: ServiceConfig) -> Iterator[str]:
    """The service's address, host:port, while it runs."""
    start(config)
    try:
        yield f"127.0.0.1:{config.port}"
    finally:
        stop()


def _application(config: ServiceConfig) -> serve.Application:
    # A stream counts as a request for as long as it lives. Those beyond the slots are let in, to be refused
    # by us with a reason: Serve's own refusal has none.
    deployment = serve.deployment(
        num_replicas=1,
        max_ongoing_requests=config.slots + 100,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": int(config.device == "cuda"),
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        graceful_shutdown_timeout_s=2,
    )(SessionService)
    return deployment.bind(config)


def _in_use(port: int) -> bool:
    """Whether somebody listens on the port, on any address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
