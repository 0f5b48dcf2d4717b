"""The session service on Ray Serve, spoken to over gRPC as any client would."""

import asyncio
import io
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from PIL import Image

from minwm.client import SessionClient
from minwm.client.playback import play_trajectory
from minwm.client.v1 import session_pb2 as pb
from minwm.client.v1.session_pb2_grpc import SessionServiceStub
from minwm.errors import CheckpointError, ConfigError
from minwm.geometry.trajectory import parse
from minwm_session.deployment import ServiceConfig, start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


class Stream:
    """One raw Interact stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = SessionServiceStub(channel).Interact()  # type: ignore[no-untyped-call]

    async def say(self, **event: Any) -> None:
        await self.call.write(pb.ClientEvent(**event))

    async def hear(self) -> pb.ServerEvent:
        """The next event. Raises AioRpcError when the stream failed."""
        async with asyncio.timeout(20):
            event = await self.call.read()
        if event is grpc.aio.EOF:
            raise EOFError
        return event

    async def chunk(self) -> pb.Chunk:
        """The next chunk; acknowledgements before it are passed over."""
        while not (event := await self.hear()).HasField("chunk"):
            assert event.HasField("control_ack"), event
        return event.chunk

    async def failure(self) -> tuple[grpc.StatusCode, Status]:
        """Read to the failure that ends the stream."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                last = await self.hear()
        assert last.ended.reason == pb.END_REASON_ERROR
        trailers = dict(caught.value.trailing_metadata())
        return caught.value.code(), Status.FromString(trailers["grpc-status-details-bin"])


@asynccontextmanager
async def stream(address: str) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Stream(channel)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def metric(config: ServiceConfig, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics_port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def unpack(status: Status, kind: type[Message]) -> Any:
    message = kind()
    assert any(packed.Unpack(message) for packed in status.details), f"no {kind.__name__} in {status}"
    return message


@pytest.fixture(autouse=True)
def empty_house(address: str, config: ServiceConfig) -> None:
    """Every test starts with all slots free."""
    run(lambda: until(lambda: metric(config, 'minwm_session_slots{state="free"}') == config.slots))


def test_a_client_gets_frames_for_the_controls_it_sent_with_receipts(address: str) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            await talk.say(open=pb.Open(seed=1, start_name="hall", encodings=[pb.ENCODING_RAW]))
            started = (await talk.hear()).started
            assert (started.model.name, started.encoding) == ("tiny", pb.ENCODING_RAW)
            receipts = []
            for id, keys in ((1, ["w"]), (2, ["w", "d"]), (2, ["s"]), (1, ["s"])):
                await talk.say(control=pb.Control(id=id, move=pb.Move(keys=keys)))
                receipts.append((await talk.hear()).control_ack)
            await talk.say(credit=pb.Credit(chunks=1))
            first = await talk.chunk()
            await talk.say(control=pb.Control(id=7, look=pb.Look(yaw=-30)))
            await talk.say(credit=pb.Credit(chunks=1))
            second = await talk.chunk()
            await talk.say(close=pb.Close())
            assert (await talk.hear()).ended.reason == pb.END_REASON_CLOSED
        accepted, duplicate, stale = (
            pb.ControlAck.STATUS_ACCEPTED,
            pb.ControlAck.STATUS_DUPLICATE,
            pb.ControlAck.STATUS_STALE,
        )
        expected = [(1, accepted), (2, accepted), (2, duplicate), (1, stale)]
        assert [(receipt.id, receipt.status) for receipt in receipts] == expected
        assert [(chunk.index, chunk.last_control_id) for chunk in (first, second)] == [(0, 2), (1, 7)]
        assert [len(frame) for frame in second.frames] == [32 * 48 * 3] * 8
        assert second.timings.denoise.ToNanoseconds() > 0

    run(scenario)


def test_the_same_seed_and_controls_give_the_same_frames_and_other_controls_others(address: str) -> None:
    async def scenario() -> None:
        worlds = []
        async with SessionClient(address) as client:
            for key in ("w", "w", "l"):
                async with await client.open(seed=4, start="hall", encoding="raw") as session:
                    session.control([key])
                    session.grant(2)
                    chunks = aiter(session)
                    worlds.append(np.concatenate([(await anext(chunks)).frames for _ in range(2)]))
        assert (worlds[0] == worlds[1]).all()
        assert (worlds[0] != worlds[2]).any()

    run(scenario)


def test_a_client_that_stops_granting_credits_stops_generation(address: str, config: ServiceConfig) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            before = metric(config, "minwm_chunks_total")
            await talk.say(open=pb.Open(start_name="hall", encodings=[pb.ENCODING_RAW], credits=3))
            await talk.hear()
            assert [(await talk.chunk()).index for _ in range(3)] == [0, 1, 2]
            await asyncio.sleep(1)
            assert metric(config, "minwm_chunks_total") == before + 3
            await talk.say(credit=pb.Credit(chunks=1))
            assert (await talk.chunk()).index == 3

    run(scenario)


def test_ending_the_requests_ends_the_session(address: str) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            await talk.say(open=pb.Open(start_name="hall", encodings=[pb.ENCODING_RAW], credits=1000))
            await talk.hear()
            await talk.chunk()
            await talk.call.done_writing()
            while not (event := await talk.hear()).HasField("ended"):
                pass
            assert event.ended.reason == pb.END_REASON_CLOSED

    run(scenario)


def test_a_malformed_first_message_is_an_invalid_argument_that_names_the_field(address: str) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            await talk.say(credit=pb.Credit(chunks=1))
            code, status = await talk.failure()
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert status.message == "event: the first message is credit, expected open"
        assert unpack(status, BadRequest).field_violations[0].field == "event"

    run(scenario)


def test_a_control_that_is_not_a_number_ends_the_session_and_frees_its_slot(
    address: str, config: ServiceConfig
) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            await talk.say(open=pb.Open(encodings=[pb.ENCODING_RAW], credits=50))
            await talk.hear()
            await talk.say(control=pb.Control(id=1, move=pb.Move(forward=float("nan"))))
            code, status = await talk.failure()
        assert (code, status.message.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "control.move.forward")
        await until(lambda: metric(config, "minwm_sessions") == 0)

    run(scenario)


def test_an_open_beyond_the_slots_is_told_when_to_come_again(address: str) -> None:
    async def scenario() -> None:
        async with stream(address) as one, stream(address) as two, stream(address) as three:
            for talk in (one, two):
                await talk.say(open=pb.Open())
                assert (await talk.hear()).HasField("started")
            await three.say(open=pb.Open())
            code, status = await three.failure()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert unpack(status, RetryInfo).retry_delay.seconds > 0

    run(scenario)


@pytest.mark.parametrize("how", ["cancel", "channel"])
def test_a_client_that_vanishes_frees_its_slot_at_once(address: str, config: ServiceConfig, how: str) -> None:
    async def scenario() -> None:
        for _ in range(8):  # what Ray Serve tells us depends on what it was doing at the moment
            async with stream(address) as talk:
                await talk.say(open=pb.Open(encodings=[pb.ENCODING_RAW], credits=1000))
                await talk.hear()
                await talk.chunk()
                assert metric(config, "minwm_sessions") == 1
                if how == "cancel":
                    talk.call.cancel()
                    await until(lambda: metric(config, "minwm_sessions") == 0, seconds=2)
            await until(lambda: metric(config, "minwm_sessions") == 0, seconds=2)

    async def opened() -> None:
        async with stream(address) as talk:
            await talk.say(open=pb.Open())
            await talk.hear()

    run(opened)
    run(lambda: until(lambda: metric(config, "minwm_sessions") == 0))
    ended = 'minwm_session_ends_total{reason="disconnected"}'
    before = metric(config, ended)
    run(scenario)
    assert metric(config, ended) == before + 8


def test_a_silent_client_is_reaped(address: str, config: ServiceConfig) -> None:
    async def scenario() -> None:
        async with stream(address) as talk:
            await talk.say(open=pb.Open())
            await talk.hear()
            begun_at = time.monotonic()
            assert (await talk.hear()).ended.reason == pb.END_REASON_IDLE
            assert time.monotonic() - begun_at >= config.idle_seconds - 0.1
            with pytest.raises(EOFError):
                await talk.hear()

    run(scenario)


def test_a_trajectory_is_played_live_in_h264(address: str) -> None:
    playback = asyncio.run(play_trajectory(address, parse("w*2,w+l*2")))
    assert list(playback.keys) == [{"w"}] * 2 + [{"w", "l"}] * 2
    assert playback.report.frames == 32
    assert 0 < playback.report.action_to_frame_seconds.p50 < 5


def test_a_start_image_of_the_clients_begins_the_world(address: str) -> None:
    async def scenario() -> None:
        async with SessionClient(address) as client:
            (model,) = await client.models()
            assert (model.name, model.height, model.width, model.start_images) == ("tiny", 32, 48, ("hall",))
            async with await client.open(start=_png(), credits=1) as session:
                assert (await anext(aiter(session))).frames.shape == (8, 32, 48, 3)

    run(scenario)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_port_in_use_is_an_error_that_names_it(address: str, config: ServiceConfig) -> None:
    with pytest.raises(ConfigError, match=f"port: {config.port} is in use, expected a free port"):
        start(config)


def test_a_port_in_use_by_another_program_is_seen_too(world: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"metrics_port: {port} is in use"):
            start(ServiceConfig(model=world, port=1, metrics_port=port))


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="not a world model"):
        start(ServiceConfig(model=tmp_path, metrics_port=None, port=1))
