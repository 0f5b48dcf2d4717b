"""One Interact stream: the client's events in, the server's events out.

A reader takes controls and credits as they come, also while a chunk is computed; a producer makes one
chunk per credit. Both put what they have to say in one outbox, in order.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from google.protobuf.duration_pb2 import Duration

from minwm.client.v1 import session_pb2 as pb
from minwm.streaming import Chunk, Session
from minwm_session.controls import Controls
from minwm_session.encoding import make_encoder
from minwm_session.errors import OpenTimeoutError, ProtocolError
from minwm_session.flow import Credits, IdleError
from minwm_session.host import SessionHost
from minwm_session.opening import Opening, read_opening


async def interact(host: SessionHost, events: AsyncIterator[pb.ClientEvent]) -> AsyncGenerator[pb.ServerEvent, None]:
    """Serve one stream until its `ended`.

    `events` ends when the client ended or lost the stream. Closing the iterator frees the session's slot.
    Raises what `errors.to_status` maps; the caller owes the client `ended` then.
    """
    first = await _first_event(host, events)
    opened_at = time.monotonic()
    opening = read_opening(first, host.spec)
    interaction = _Interaction(host, opening, opened_at)
    session = await host.open(opening)
    # Between the two, nothing may fail or wait: the slot would stay taken.
    async with aclosing(interaction.run(session, events)) as replies:
        async for event in replies:
            yield event


async def _first_event(host: SessionHost, events: AsyncIterator[pb.ClientEvent]) -> pb.ClientEvent:
    try:
        async with asyncio.timeout(host.idle_seconds):
            return await anext(aiter(events))
    except TimeoutError:
        raise OpenTimeoutError(f"nothing came in {host.idle_seconds:g} s, expected open") from None
    except StopAsyncIteration:
        raise ProtocolError("event", "the stream ended before its first message, expected open") from None


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What the engine's thread returns for one chunk. Seconds."""

    chunk: Chunk
    control_id: int
    pieces: list[bytes]
    queue: float
    encode: float


class _Interaction:
    """An open session and its two tasks."""

    _session: Session

    def __init__(self, host: SessionHost, opening: Opening, opened_at: float) -> None:
        self._host, self._opened_at = host, opened_at
        self._encoding, self._credits_at_open = opening.encoding, opening.credits > 0
        spec = host.spec
        self._encoder = make_encoder(opening.encoding, height=spec.height, width=spec.width, fps=spec.fps)
        self._controls = Controls(spec.speeds)
        self._credits = Credits(opening.credits, idle_seconds=host.idle_seconds)
        self._outbox: asyncio.Queue[pb.ServerEvent | Exception] = asyncio.Queue()
        self._end_label = "disconnected"

    async def run(
        self, session: Session, events: AsyncIterator[pb.ClientEvent]
    ) -> AsyncGenerator[pb.ServerEvent, None]:
        """Everything the server says after `open`. Frees the session's slot in the end, however it comes."""
        self._session = session
        tasks = [asyncio.create_task(self._read(events)), asyncio.create_task(self._produce())]
        try:
            yield pb.ServerEvent(
                started=pb.Started(
                    session_id=uuid.uuid4().hex, model=self._host.describe_model(), encoding=self._encoding
                )
            )
            while True:
                event = await self._outbox.get()
                if isinstance(event, Exception):
                    self._end_label = "error"
                    raise event
                yield event
                if event.HasField("ended"):
                    return
        finally:
            for task in tasks:
                task.cancel()
            # Before the slot is freed: whoever sees it free finds the end counted.
            self._host.metrics.ends.labels(self._end_label).inc()
            self._host.close(self._session)

    def _end(self, reason: pb.EndReason, label: str) -> None:
        self._end_label = label
        self._outbox.put_nowait(pb.ServerEvent(ended=pb.Ended(reason=reason)))

    async def _read(self, events: AsyncIterator[pb.ClientEvent]) -> None:
        try:
            async for event in events:
                self._credits.heard()
                if event.HasField("close"):
                    self._end(pb.END_REASON_CLOSED, "closed")
                    return
                self._take(event)
            self._end(pb.END_REASON_CLOSED, "disconnected")
        except Exception as error:
            self._outbox.put_nowait(error)

    def _take(self, event: pb.ClientEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "control":
            status = self._controls.accept(event.control, time.monotonic())
            self._outbox.put_nowait(pb.ServerEvent(control_ack=pb.ControlAck(id=event.control.id, status=status)))
        elif kind == "credit":
            self._credits.grant("credit.chunks", event.credit.chunks)
        else:
            raise ProtocolError("event", f"{kind or 'empty'} in an open session, expected control, credit or close")

    async def _produce(self) -> None:
        try:
            while True:
                waiting_since = time.monotonic()
                await self._credits.take()
                credit_at = time.monotonic()
                self._host.metrics.credit_stall.inc(credit_at - waiting_since)
                made = await self._host.run(partial(self._make, credit_at))
                self._outbox.put_nowait(pb.ServerEvent(chunk=self._message(made)))
                self._measure(made, credit_at)
                await self._settle()
        except IdleError:
            self._end(pb.END_REASON_IDLE, "idle")
        except Exception as error:
            self._outbox.put_nowait(error)

    def _make(self, credit_at: float) -> _Made:
        """On the engine's thread: one chunk with the controls of this moment, encoded."""
        begun_at = time.monotonic()
        controls = self._controls.current
        chunk = self._host.advance(self._session, controls.velocity)
        advanced_at = time.monotonic()
        pieces = self._encoder.encode(chunk.frames)
        return _Made(
            chunk=chunk,
            control_id=controls.control_id,
            pieces=pieces,
            queue=begun_at - credit_at,
            encode=time.monotonic() - advanced_at,
        )

    def _message(self, made: _Made) -> pb.Chunk:
        return pb.Chunk(
            index=made.chunk.index,
            presentation_time=_duration(made.chunk.index * self._host.spec.chunk_seconds),
            last_control_id=made.control_id,
            encoding=self._encoding,
            frames=made.pieces,
            timings=pb.Timings(
                queue=_duration(made.queue),
                denoise=_duration(made.chunk.denoise_seconds),
                decode=_duration(made.chunk.decode_seconds),
                encode=_duration(made.encode),
            ),
        )

    def _measure(self, made: _Made, credit_at: float) -> None:
        metrics, now = self._host.metrics, time.monotonic()
        metrics.chunks.inc()
        metrics.chunk_duration.labels("denoise").observe(made.chunk.denoise_seconds)
        metrics.chunk_duration.labels("decode").observe(made.chunk.decode_seconds)
        metrics.chunk_duration.labels("encode").observe(made.encode)
        if made.chunk.index == 0:
            metrics.time_to_first_frame.observe(now - (self._opened_at if self._credits_at_open else credit_at))
        for accepted_at in self._controls.applied(made.control_id):
            metrics.action_to_frame.observe(now - accepted_at)

    async def _settle(self) -> None:
        """The clean-context forward, after the chunk is on its way."""

        def settle() -> float:
            begun_at = time.monotonic()
            self._host.engine.settle([self._session])
            return time.monotonic() - begun_at

        self._host.metrics.chunk_duration.labels("context").observe(await self._host.run(settle))


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
