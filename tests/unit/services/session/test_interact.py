"""One Interact stream: receipts, credits, ends, slots."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from minwm.client.v1 import session_pb2 as pb
from minwm.errors import MinwmError
from minwm_session.errors import NoFreeSlotError, OpenTimeoutError, ProtocolError, UnknownModelError
from minwm_session.host import SessionHost

pytestmark = pytest.mark.unit

RAW = [pb.ENCODING_RAW]
Converse = Callable[[], Any]


def control(id: int, *keys: str) -> pb.Control:
    return pb.Control(id=id, move=pb.Move(keys=keys))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_chunks_name_the_last_control_and_apply_it_from_the_next_boundary(converse: Converse, engine: Any) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(seed=7, prompt="a hall", start_name="yard", encodings=RAW))
            started = (await talk.hear()).started
            assert (started.model.name, started.model.frames_per_chunk, started.encoding) == ("flat", 8, RAW[0])
            talk.say(credit=pb.Credit(chunks=1))
            first = await talk.hear_chunk()
            talk.say(control=control(1, "w"))
            talk.say(control=pb.Control(id=5, look=pb.Look(yaw=-30)))
            talk.say(credit=pb.Credit(chunks=1))
            acks = [(await talk.hear()).control_ack for _ in range(2)]
            second = await talk.hear_chunk()
            await until(lambda: engine.sessions[0].settled == 2)
        assert [(ack.id, ack.status) for ack in acks] == [(n, pb.ControlAck.STATUS_ACCEPTED) for n in (1, 5)]
        assert [(chunk.index, chunk.last_control_id) for chunk in (first, second)] == [(0, 0), (1, 5)]
        assert [len(frame) for frame in second.frames] == [32 * 48 * 3] * 8
        assert second.presentation_time.ToNanoseconds() / 1e9 == pytest.approx(8 / 17.5)

    run(scenario)
    session = engine.sessions[0]
    assert (session.seed, session.prompt, session.start_image) == (7, "a hall", "yard")
    still, moving = session.velocities
    assert (still.forward, moving.forward, moving.yaw) == (0, 2, -30)
    assert engine.threads == 1


def test_a_control_during_a_chunk_is_acknowledged_at_once_and_applies_to_the_next(
    converse: Converse, engine: Any
) -> None:
    async def scenario() -> None:
        engine.gate.clear()
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, credits=2))
            await talk.hear()
            await until(lambda: bool(engine.sessions[0].velocities))
            talk.say(control=control(1, "s"))
            assert (await talk.hear()).control_ack.id == 1
            engine.gate.set()
            assert [(await talk.hear_chunk()).last_control_id for _ in range(2)] == [0, 1]

    run(scenario)
    assert [velocity.forward for velocity in engine.sessions[0].velocities] == [0, -2]


def test_a_repeated_control_is_a_duplicate_an_older_one_stale_and_neither_counts(
    converse: Converse, engine: Any
) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW))
            await talk.hear()
            for sent in (control(4, "w"), control(4, "s"), control(3, "s")):
                talk.say(control=sent)
            acks = [(await talk.hear()).control_ack for _ in range(3)]
            talk.say(credit=pb.Credit(chunks=1))
            chunk = await talk.hear_chunk()
        names = [pb.ControlAck.Status.Name(ack.status) for ack in acks]
        assert names == ["STATUS_ACCEPTED", "STATUS_DUPLICATE", "STATUS_STALE"]
        assert chunk.last_control_id == 4

    run(scenario)
    assert engine.sessions[0].velocities[0].forward == 2


def test_generation_stops_without_credit(converse: Converse, engine: Any) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, credits=3))
            await talk.hear()
            for _ in range(3):
                await talk.hear_chunk()
            await asyncio.sleep(0.2)
            assert len(engine.sessions[0].velocities) == 3
            talk.say(credit=pb.Credit(chunks=1))
            assert (await talk.hear_chunk()).index == 3

    run(scenario)


@pytest.mark.parametrize("how", ["close", "end", "leave"])
def test_the_slot_is_free_at_once_when_the_client_goes(converse: Converse, engine: Any, how: str) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, credits=100))
            await talk.hear()
            await talk.hear_chunk()
            if how == "close":
                talk.say(close=pb.Close())
                assert (await talk.hear_rest())[-1].ended.reason == pb.END_REASON_CLOSED
            elif how == "end":
                talk.end_requests()
                assert (await talk.hear_rest())[-1].ended.reason == pb.END_REASON_CLOSED
            else:
                await talk.leave()
            await until(lambda: engine.free_slots == 2)

    run(scenario)
    assert len(engine.sessions[0].velocities) < 100


def test_leaving_during_the_opening_leaves_no_slot_behind(host: SessionHost, converse: Converse, engine: Any) -> None:
    async def scenario() -> None:
        busy = asyncio.create_task(host.run(lambda: engine.gate.wait(5)))
        engine.gate.clear()
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW))
            hearing = asyncio.create_task(talk.hear())
            await asyncio.sleep(0.05)
            hearing.cancel()
            await asyncio.wait([hearing])
            engine.gate.set()
        await busy
        await host.run(lambda: None)

    run(scenario)
    assert engine.free_slots == 2


def test_a_silent_client_without_credit_is_reaped(engine: Any, converse: Converse, host: SessionHost) -> None:
    async def scenario() -> None:
        host.idle_seconds = 0.1
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, credits=1))
            *_, ended = await talk.hear_rest()
            assert ended.ended.reason == pb.END_REASON_IDLE
            await until(lambda: engine.free_slots == 2)

    run(scenario)


def test_controls_keep_a_client_without_credit_alive(converse: Converse, host: SessionHost) -> None:
    async def scenario() -> None:
        host.idle_seconds = 0.2
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW))
            await talk.hear()
            for id in range(1, 7):
                await asyncio.sleep(0.1)
                talk.say(control=control(id, "w"))
                assert (await talk.hear()).control_ack.id == id

    run(scenario)


def test_a_stream_that_never_opens_is_given_up(converse: Converse, host: SessionHost) -> None:
    async def scenario() -> None:
        host.idle_seconds = 0.05
        async with converse() as talk:
            with pytest.raises(OpenTimeoutError, match=r"expected open"):
                await talk.hear()

    run(scenario)


def test_a_full_house_refuses_with_the_number_of_slots(converse: Converse) -> None:
    async def scenario() -> None:
        async with converse() as one, converse() as two, converse() as three:
            for talk in (one, two, three):
                talk.say(open=pb.Open(encodings=RAW))
            await one.hear()
            await two.hear()
            with pytest.raises(NoFreeSlotError, match="all 2 session slots"):
                await three.hear()
            one.say(close=pb.Close())
            await one.hear_rest()
        async with converse() as four:
            four.say(open=pb.Open(encodings=RAW))
            assert (await four.hear()).HasField("started")

    run(scenario)


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        (pb.ClientEvent(), ProtocolError, "event: the first message is empty, expected open"),
        (pb.ClientEvent(control=control(1, "w")), ProtocolError, "event: the first message is control, expected open"),
        (pb.ClientEvent(open=pb.Open(model="doom")), UnknownModelError, "open.model: no model 'doom'"),
        (pb.ClientEvent(open=pb.Open(start_name="attic")), ProtocolError, "open.start_name: no start image 'attic'"),
        (pb.ClientEvent(open=pb.Open(start_image=b"GIF89a")), ProtocolError, "open.start_image: 6 bytes are no PNG"),
        (pb.ClientEvent(open=pb.Open(encodings=[17])), ProtocolError, "open.encodings: .17. has nothing we can send"),
        (pb.ClientEvent(open=pb.Open(credits=2**31)), ProtocolError, "open.credits: 2147483648 chunks outstanding"),
    ],
)
def test_a_malformed_first_message_names_what_is_wrong(
    converse: Converse, engine: Any, first: pb.ClientEvent, error: type[MinwmError], message: str
) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(
                **{first.WhichOneof("event"): getattr(first, first.WhichOneof("event"))} if first.ByteSize() else {}
            )
            with pytest.raises(error, match=message):
                await talk.hear()
            await until(lambda: engine.free_slots == 2)

    run(scenario)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (pb.ClientEvent(control=pb.Control(id=0)), "control.id: 0 is no id"),
        (pb.ClientEvent(control=control(1, "l")), "control.move.keys: unknown key 'l', expected some of w s a d u dn"),
        (pb.ClientEvent(control=pb.Control(id=1, move=pb.Move(up=math.nan))), "control.move.up: nan is no velocity"),
        (pb.ClientEvent(control=pb.Control(id=1, look=pb.Look(yaw=math.inf))), "control.look.yaw: inf is no velocity"),
        (pb.ClientEvent(credit=pb.Credit(chunks=5000)), "credit.chunks: 5000 chunks outstanding"),
        (pb.ClientEvent(open=pb.Open()), "event: open in an open session"),
    ],
)
def test_a_malformed_message_ends_the_session_and_names_the_field(
    converse: Converse, engine: Any, event: pb.ClientEvent, message: str
) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW))
            await talk.hear()
            kind = event.WhichOneof("event")
            talk.say(**{kind: getattr(event, kind)})
            with pytest.raises(ProtocolError, match=message):
                await talk.hear()
            await until(lambda: engine.free_slots == 2)

    run(scenario)


def test_an_engine_failure_surfaces_and_frees_the_slot(converse: Converse, engine: Any) -> None:
    async def scenario() -> None:
        engine.fail_at = 1
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, credits=5))
            await talk.hear()
            await talk.hear_chunk()
            with pytest.raises(RuntimeError, match="the world broke"):
                await talk.hear_rest()
            await until(lambda: engine.free_slots == 2)

    run(scenario)


def test_a_start_image_reaches_the_engine_in_the_models_size(converse: Converse, engine: Any, png: bytes) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW, start_image=png))
            await talk.hear()

    run(scenario)
    start = engine.sessions[0].start_image
    assert isinstance(start, np.ndarray)
    assert (start.shape, start.dtype, start.std() > 0) == ((32, 48, 3), np.uint8, True)


def test_metrics_count_what_happened(converse: Converse, engine: Any, registry: CollectorRegistry) -> None:
    async def scenario() -> None:
        async with converse() as talk:
            talk.say(open=pb.Open(encodings=RAW))
            await talk.hear()
            assert registry.get_sample_value("minwm_sessions") == 1
            assert registry.get_sample_value("minwm_session_slots", {"state": "free"}) == 1
            await asyncio.sleep(0.05)
            for id in (1, 2, 3):
                talk.say(control=control(id, "w"))
            talk.say(credit=pb.Credit(chunks=2))
            await talk.hear_chunk()
            await talk.hear_chunk()
            context = {"stage": "context"}
            await until(lambda: registry.get_sample_value("minwm_chunk_duration_seconds_count", context) == 2)
            talk.say(close=pb.Close())
            await talk.hear_rest()
            await until(lambda: registry.get_sample_value("minwm_sessions") == 0)

    run(scenario)
    samples = registry.get_sample_value
    assert samples("minwm_chunks_total") == 2
    assert samples("minwm_action_to_frame_seconds_count") == 3
    assert samples("minwm_time_to_first_frame_seconds_count") == 1
    assert samples("minwm_session_ends_total", {"reason": "closed"}) == 1
    assert 0.04 < (samples("minwm_credit_stall_seconds_total") or 0) < 2
    for stage in ("denoise", "decode", "encode", "context"):
        assert samples("minwm_chunk_duration_seconds_count", {"stage": stage}) == 2
