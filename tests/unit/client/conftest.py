"""A scripted session service on a real gRPC server: a flat raw chunk for every credit."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from minwm.client.v1 import session_pb2 as pb
from minwm.client.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server

MODEL = pb.ModelSpec(
    name="flat", height=16, width=24, frames_per_second=80, frames_per_chunk=8, start_images=["hall", "yard"]
)


@dataclass
class ScriptedService(SessionServiceServicer):
    """`delays[i]` seconds go by before chunk i; the stream ends with `end` after `end_after` chunks."""

    delays: dict[int, float] = field(default_factory=dict)
    refusal: str | None = None
    end_after: int | None = None
    end: pb.EndReason = pb.END_REASON_CLOSED
    opened: pb.Open | None = None
    controls: list[pb.Control] = field(default_factory=list)
    granted: int = 0
    sent: int = 0
    closed: bool = False

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[MODEL])

    async def Interact(self, requests: AsyncIterator[pb.ClientEvent], context: Any) -> AsyncIterator[pb.ServerEvent]:
        self.opened = (await anext(requests)).open
        if self.refusal is not None:
            yield pb.ServerEvent(ended=pb.Ended(reason=pb.END_REASON_ERROR))
            context.set_trailing_metadata([("grpc-status-details-bin", b"")])
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.refusal)
        yield pb.ServerEvent(started=pb.Started(session_id="s1", model=MODEL, encoding=pb.ENCODING_RAW))
        self.granted = self.opened.credits
        outbox: asyncio.Queue[pb.ServerEvent] = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, outbox))
        maker = asyncio.create_task(self._make(outbox))
        try:
            while True:
                event = await outbox.get()
                yield event
                if event.HasField("ended"):
                    return
        finally:
            reader.cancel()
            maker.cancel()

    async def _read(self, requests: AsyncIterator[pb.ClientEvent], outbox: asyncio.Queue[pb.ServerEvent]) -> None:
        async for event in requests:
            if event.HasField("control"):
                self.controls.append(event.control)
                outbox.put_nowait(pb.ServerEvent(control_ack=pb.ControlAck(id=event.control.id)))
            elif event.HasField("credit"):
                self.granted += event.credit.chunks
            elif event.HasField("close"):
                self.closed = True
                outbox.put_nowait(pb.ServerEvent(ended=pb.Ended(reason=pb.END_REASON_CLOSED)))

    async def _make(self, outbox: asyncio.Queue[pb.ServerEvent]) -> None:
        while self.sent != self.end_after:
            while self.sent >= self.granted:
                await asyncio.sleep(0.001)
            last = self.controls[-1].id if self.controls else 0
            await asyncio.sleep(self.delays.get(self.sent, 0.0))
            frames = [bytes([self.sent]) * (16 * 24 * 3)] * 8
            chunk = pb.Chunk(index=self.sent, last_control_id=last, encoding=pb.ENCODING_RAW, frames=frames)
            chunk.timings.denoise.FromMilliseconds(30)
            self.sent += 1
            outbox.put_nowait(pb.ServerEvent(chunk=chunk))
        outbox.put_nowait(pb.ServerEvent(ended=pb.Ended(reason=self.end)))


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def serving(service: ScriptedService) -> Callable[[], Any]:
    """The service's address, in an async context."""

    @asynccontextmanager
    async def served() -> AsyncIterator[str]:
        server = grpc.aio.server()
        add_SessionServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

    return served


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
