"""The session service beside us: `minwm serve` as a process of its own, for as long as it is needed.

Pipelines do not import the service; its command and its gRPC end point are all they know of it.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minwm.client import SessionClient
from minwm.errors import SessionError

_COMMAND = (sys.executable, "-c", "from minwm.cli import main; main()", "serve")
_START_SECONDS = 180.0  # Ray takes half a minute on an idle machine
_STOP_SECONDS = 30.0
_LAST_LINES = 5


@contextmanager
def served(world: Path, log: Path) -> Iterator[str]:
    """Serve the world's folder; the service's address, host:port. `log` gets all it prints.

    Raises SessionError, with the service's last words, when it does not come up.
    """
    port, metrics_port = _free_ports()
    command = [*_COMMAND, "--model", str(world), "--port", str(port), "--metrics-port", str(metrics_port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            address = f"127.0.0.1:{port}"
            asyncio.run(_wait_until_ready(address, process, log))
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


async def _wait_until_ready(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            async with SessionClient(address) as client:
                await client.models()
            return
        except SessionError as error:
            if process.poll() is not None:
                last = " ".join(" ".join(log.read_text().splitlines()[-_LAST_LINES:]).split())
                raise SessionError(f"the session service ended while starting: {last}") from error
            if time.monotonic() > deadline:
                raise SessionError(
                    f"the session service did not start within {_START_SECONDS:.0f} s; see {log}"
                ) from error
        await asyncio.sleep(0.5)


def _free_ports() -> tuple[int, int]:
    """Two ports nobody listens on at the moment."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("", 0))
        two.bind(("", 0))
        return int(one.getsockname()[1]), int(two.getsockname()[1])
