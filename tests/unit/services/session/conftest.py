"""A small engine for the protocol's tests: the real interface, flat frames instead of a world."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CollectorRegistry

from minwm.client.v1 import session_pb2 as pb
from minwm.errors import SessionError
from minwm.geometry.live import CameraVelocity, Speeds
from minwm.streaming import Chunk, StreamSpec, Turn
from minwm_session.host import SessionHost
from minwm_session.interact import interact

SPEC = StreamSpec(
    model="flat",
    height=32,
    width=48,
    fps=17.5,
    frames_per_chunk=8,
    speeds=Speeds(move=2.0, turn=90.0),
    start_images=("hall", "yard"),
)


@dataclass
class FlatSession:
    """What the engine was asked for, in order."""

    seed: int
    prompt: str
    start_image: NDArray[np.uint8] | str | None
    velocities: list[CameraVelocity] = field(default_factory=list)
    settled: int = 0
    closed: bool = False


class FlatEngine:
    """Frames of chunk i have brightness 10·i. `gate` holds a chunk's computation up while it is cleared."""

    def __init__(self, slots: int = 2) -> None:
        self.spec = SPEC
        self.sessions: list[FlatSession] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_at: int | None = None
        self._slots = slots
        self._threads: set[int] = set()

    @property
    def free_slots(self) -> int:
        return self._slots - sum(not session.closed for session in self.sessions)

    @property
    def threads(self) -> int:
        """How many threads have called."""
        return len(self._threads)

    def open(self, *, seed: int, prompt: str = "", start_image: NDArray[np.uint8] | str | None = None) -> FlatSession:
        self._threads.add(threading.get_ident())
        if self.free_slots == 0:
            raise SessionError("no slot is free")
        self.sessions.append(FlatSession(seed, prompt, start_image))
        return self.sessions[-1]

    def advance(self, turns: Sequence[Turn]) -> list[Chunk | SessionError]:
        return [self._next(cast(Any, turn.session), turn.velocity) for turn in turns]

    def _next(self, session: FlatSession, velocity: CameraVelocity) -> Chunk:
        self._threads.add(threading.get_ident())
        index = len(session.velocities)
        session.velocities.append(velocity)
        self.gate.wait(10)
        if self.fail_at == index:
            raise RuntimeError("the world broke")
        frames = np.full((SPEC.frames_per_chunk, SPEC.height, SPEC.width, 3), 10 * index % 256, np.uint8)
        return Chunk(index=index, frames=frames, denoise_seconds=0.03, decode_seconds=0.01)

    def settle(self, sessions: Sequence[FlatSession]) -> None:
        self._threads.add(threading.get_ident())
        for session in sessions:
            session.settled += 1

    def close(self, session: FlatSession) -> None:
        self._threads.add(threading.get_ident())
        session.closed = True


@pytest.fixture
def engine() -> FlatEngine:
    return FlatEngine()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def host(engine: FlatEngine, registry: CollectorRegistry) -> SessionHost:
    return SessionHost(lambda: engine, idle_seconds=5.0, registry=registry)  # type: ignore[arg-type]


class Conversation:
    """The client's side of one stream, without a network."""

    def __init__(self, host: SessionHost) -> None:
        self._events: asyncio.Queue[pb.ClientEvent | None] = asyncio.Queue()
        self._replies = interact(host, self._requests())

    async def _requests(self) -> AsyncIterator[pb.ClientEvent]:
        while (event := await self._events.get()) is not None:
            yield event

    def say(self, **event: Any) -> None:
        self._events.put_nowait(pb.ClientEvent(**event))

    def end_requests(self) -> None:
        self._events.put_nowait(None)

    async def hear(self) -> pb.ServerEvent:
        """The next event. Raises StopAsyncIteration at the stream's end."""
        async with asyncio.timeout(5):
            return await anext(self._replies)

    async def hear_chunk(self) -> pb.Chunk:
        """The next chunk; acknowledgements before it are passed over."""
        while not (event := await self.hear()).HasField("chunk"):
            assert event.HasField("control_ack"), event
        return event.chunk

    async def hear_rest(self) -> list[pb.ServerEvent]:
        async with asyncio.timeout(5):
            return [event async for event in self._replies]

    async def leave(self) -> None:
        """What Ray Serve does when the client is gone: close the generator."""
        await self._replies.aclose()


@pytest.fixture
def converse(host: SessionHost) -> Callable[[], Any]:
    """A conversation with the host, to be used as an async context."""

    @asynccontextmanager
    async def conversation() -> AsyncIterator[Conversation]:
        talk = Conversation(host)
        yield talk
        await talk.leave()

    return conversation


@pytest.fixture
def png() -> bytes:
    """A picture of noise, in other proportions than the model's."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()
