"""The service's command: `minwm serve`."""

import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add `serve` to the command line."""
    app.command(name="serve")(serve)


def serve(
    model: Annotated[Path, typer.Option(help="Folder of an exported model.")],
    port: Annotated[int, typer.Option(help="gRPC port.")] = 9000,
    slots: Annotated[int, typer.Option(help="Sessions at a time.")] = 2,
    metrics_port: Annotated[int, typer.Option(help="Port of the Prometheus metrics.")] = 9090,
    idle_seconds: Annotated[float, typer.Option(help="End a session that is silent and without credit.")] = 60.0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the model runs.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile it; ready a minute later.")] = False,
) -> None:
    """Serve a model to interactive sessions over gRPC, until Ctrl-C."""
    from minwm_session.deployment import ServiceConfig, running_service  # takes seconds to import

    console = Console()
    config = ServiceConfig(
        model=model,
        port=port,
        slots=slots,
        metrics_port=metrics_port,
        idle_seconds=idle_seconds,
        device=device,
        compiled=compiled,
    )
    with ExitStack() as stack:
        with console.status(f"Starting Ray Serve with {model} (about half a minute)"):
            address = stack.enter_context(running_service(config))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container's stop is a Ctrl-C too
        console.print(
            f"[bold green]ready[/]: sessions on {address}, metrics on http://127.0.0.1:{metrics_port}/metrics"
        )
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        console.print("Stopping …")
