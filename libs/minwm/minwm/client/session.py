"""The client of the session service: open a session, send controls, play the chunks that come back.

Latencies are the client's own: from the moment a control or `open` is sent to the moment the first chunk
that applies it has arrived. Controls and credits are sent in the order they are called.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from minwm.client.decoding import make_decoder
from minwm.client.keys import LOOK_KEYS, MOVE_KEYS
from minwm.client.v1 import session_pb2 as pb
from minwm.client.v1.session_pb2_grpc import SessionServiceStub
from minwm.errors import SessionError

EncodingName = Literal["h264", "jpeg", "raw"]
_ENCODINGS = {"h264": pb.ENCODING_H264, "jpeg": pb.ENCODING_JPEG, "raw": pb.ENCODING_RAW}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a served model makes: pictures of height × width, `frames_per_chunk` at a time."""

    name: str
    height: int
    width: int
    fps: float
    frames_per_chunk: int
    start_images: tuple[str, ...]

    @property
    def chunk_seconds(self) -> float:
        """How long a chunk plays."""
        return self.frames_per_chunk / self.fps


@dataclass(frozen=True, kw_only=True)
class ServerTimings:
    """Seconds that the server spent on a chunk."""

    queue: float
    denoise: float
    decode: float
    encode: float


@dataclass(frozen=True, kw_only=True)
class ReceivedChunk:
    """Frames (t, y, x, 3) and what is known of them.

    `last_control` is the id of the last control applied (0: none); `action_to_frame` has the seconds from each
    control that this chunk is the first to apply (or supersede) to its arrival.
    """

    index: int
    frames: NDArray[np.uint8]
    last_control: int
    action_to_frame: tuple[float, ...]
    server: ServerTimings
    arrived_at: float


@dataclass(frozen=True, kw_only=True)
class PlayedChunk:
    """A chunk whose playout starts now. `late` seconds after its turn: 0 when it was there in time."""

    chunk: ReceivedChunk
    late: float


class SessionClient:
    """A connection to a session service at `address` (host:port). Use as an async context manager."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address)
        self._stub: Any = SessionServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def models(self) -> tuple[ModelInfo, ...]:
        """The models that sessions can be opened on. Raises SessionError when the service does not answer."""
        try:
            reply = await self._stub.ListModels(pb.ListModelsRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            raise _session_error(self._address, error) from error
        return tuple(_model_info(model) for model in reply.models)

    async def open(
        self,
        *,
        model: str = "",
        prompt: str = "",
        seed: int = 0,
        start: str | bytes | None = None,
        encoding: EncodingName = "h264",
        credits: int = 0,
    ) -> "ClientSession":
        """Open a session; `start` is a start image's name, or a PNG or JPEG file.

        Raises SessionError with the server's message when it refuses.
        """
        request = pb.Open(
            model=model,
            prompt=prompt,
            seed=seed,
            start_name=start if isinstance(start, str) else None,
            start_image=start if isinstance(start, bytes) else None,
            encodings=[_ENCODINGS[encoding]],
            credits=credits,
        )
        session = ClientSession(self._address)
        await session.start(self._stub, request)
        return session


class ClientSession:
    """An open session. Made by `SessionClient.open`; use as an async context manager, or `close` it.

    `time_to_first_frame` is in seconds from `open` to the arrival of the first chunk, None before it.
    """

    model: ModelInfo
    session_id: str
    time_to_first_frame: float | None = None

    def __init__(self, address: str) -> None:
        self._address = address
        self._outgoing: asyncio.Queue[pb.ClientEvent | None] = asyncio.Queue()
        self._incoming: asyncio.Queue[ReceivedChunk | SessionError | None] = asyncio.Queue()
        self._unapplied: deque[tuple[int, float]] = deque()
        self._last_id = 0
        self._loop = asyncio.get_running_loop()

    async def start(self, stub: Any, request: pb.Open) -> None:
        """Send `open` and wait for `started`. `SessionClient.open` calls it."""
        self._opened_at = self._loop.time()
        self._outgoing.put_nowait(pb.ClientEvent(open=request))
        self._call = stub.Interact(self._requests())
        started = await self._next_event()
        if started is None or not started.HasField("started"):
            raise SessionError(f"{self._address}: the session service did not start the session")
        self.session_id = started.started.session_id
        self.model = _model_info(started.started.model)
        self._decoder = make_decoder(started.started.encoding, height=self.model.height, width=self.model.width)
        self._receiver = asyncio.create_task(self._receive())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def control(
        self,
        keys: Iterable[str] = (),
        *,
        forward: float = 0.0,
        right: float = 0.0,
        up: float = 0.0,
        yaw: float = 0.0,
        pitch: float = 0.0,
    ) -> int:
        """Replace what is held: the trajectory grammar's keys, plus a velocity (world units/s, degrees/s).

        Returns the control's id, which chunks name when they apply it. Raises SessionError for an unknown key.
        """
        held = list(keys)
        if unknown := sorted(set(held) - {*MOVE_KEYS, *LOOK_KEYS}):
            raise SessionError(f"unknown key {unknown[0]!r}, expected some of {' '.join(MOVE_KEYS + LOOK_KEYS)}")
        self._last_id += 1
        move = pb.Move(keys=[key for key in held if key in MOVE_KEYS], forward=forward, right=right, up=up)
        look = pb.Look(keys=[key for key in held if key in LOOK_KEYS], yaw=yaw, pitch=pitch)
        self._unapplied.append((self._last_id, self._loop.time()))
        self._outgoing.put_nowait(pb.ClientEvent(control=pb.Control(id=self._last_id, move=move, look=look)))
        return self._last_id

    def grant(self, chunks: int = 1) -> None:
        """Let the server make further chunks."""
        self._outgoing.put_nowait(pb.ClientEvent(credit=pb.Credit(chunks=chunks)))

    async def __aiter__(self) -> AsyncIterator[ReceivedChunk]:
        """Chunks as they arrive. Ends when the session does; raises SessionError when that was not our wish."""
        while (item := await self._incoming.get()) is not None:
            if isinstance(item, SessionError):
                raise item
            yield item

    async def play(self, chunks: int | None = None, *, window: int = 2) -> AsyncIterator[PlayedChunk]:
        """Chunks when their turn to be shown comes, at the model's pace; `chunks` of them, or endlessly.

        At most `window` chunks are granted and not played to their end: one being shown, the rest being made.
        Each time the caller comes back for more, one further chunk is granted: controls sent before apply to it.
        Open the session without credits.
        """
        granted = max(window - 1, 1) if chunks is None else min(max(window - 1, 1), chunks)
        self.grant(granted)
        due: float | None = None
        async for chunk in self:
            late = 0.0
            if due is not None:
                late = max(0.0, chunk.arrived_at - due)
                await asyncio.sleep(due - self._loop.time())
            due = max(self._loop.time(), due or 0.0) + self.model.chunk_seconds
            yield PlayedChunk(chunk=chunk, late=late)
            if chunks is not None and chunk.index + 1 == chunks:
                return
            if chunks is None or granted < chunks:
                self.grant()
                granted += 1

    async def close(self) -> None:
        """End the session; harmless when it has ended."""
        self._outgoing.put_nowait(pb.ClientEvent(close=pb.Close()))
        self._outgoing.put_nowait(None)
        try:
            await asyncio.wait_for(asyncio.shield(self._receiver), 5)
        except TimeoutError:
            self._call.cancel()
            await self._receiver

    async def _requests(self) -> AsyncIterator[pb.ClientEvent]:
        while (event := await self._outgoing.get()) is not None:
            yield event

    async def _next_event(self) -> pb.ServerEvent | None:
        """The next event but acknowledgements and errors' `ended`; None at the stream's end."""
        event: pb.ServerEvent
        try:
            async for event in self._call:
                if event.HasField("ended") and event.ended.reason == pb.END_REASON_IDLE:
                    raise SessionError("the server ended the session: nothing was sent and no chunk granted for long")
                if not event.HasField("control_ack") and not event.HasField("ended"):
                    return event
        except grpc.aio.AioRpcError as error:
            raise _session_error(self._address, error) from error
        return None

    async def _receive(self) -> None:
        try:
            while (event := await self._next_event()) is not None:
                self._incoming.put_nowait(self._read_chunk(event.chunk))
            self._incoming.put_nowait(None)
        except asyncio.CancelledError:  # of the call, by `close`
            self._incoming.put_nowait(None)
        except SessionError as error:
            self._incoming.put_nowait(error)

    def _read_chunk(self, chunk: pb.Chunk) -> ReceivedChunk:
        arrived_at = self._loop.time()
        if self.time_to_first_frame is None:
            self.time_to_first_frame = arrived_at - self._opened_at
        latencies = []
        while self._unapplied and self._unapplied[0][0] <= chunk.last_control_id:
            latencies.append(arrived_at - self._unapplied.popleft()[1])
        return ReceivedChunk(
            index=chunk.index,
            frames=self._decoder.decode(chunk.frames),
            last_control=chunk.last_control_id,
            action_to_frame=tuple(latencies),
            server=_server_timings(chunk.timings),
            arrived_at=arrived_at,
        )


def _server_timings(timings: pb.Timings) -> ServerTimings:
    return ServerTimings(
        queue=timings.queue.ToNanoseconds() / 1e9,
        denoise=timings.denoise.ToNanoseconds() / 1e9,
        decode=timings.decode.ToNanoseconds() / 1e9,
        encode=timings.encode.ToNanoseconds() / 1e9,
    )


def _model_info(model: pb.ModelSpec) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        height=model.height,
        width=model.width,
        fps=model.frames_per_second,
        frames_per_chunk=model.frames_per_chunk,
        start_images=tuple(model.start_images),
    )


def _session_error(address: str, error: grpc.aio.AioRpcError) -> SessionError:
    if error.code() == grpc.StatusCode.UNAVAILABLE and not _has_details(error):
        return SessionError(f"{address}: no session service answers there")
    return SessionError(f"{address}: {error.details()} ({error.code().name})")


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    """Whether the service itself, not the connection, gave this status."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata())
