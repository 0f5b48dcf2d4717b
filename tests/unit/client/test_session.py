"""The client of the session service, against a scripted one."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minwm.client import SessionClient
from minwm.client.v1 import session_pb2 as pb
from minwm.errors import SessionError

pytestmark = pytest.mark.unit

Serving = Callable[[], Any]
CHUNK_SECONDS = 0.1


def test_chunks_arrive_decoded_with_the_latency_of_the_controls_they_apply(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        service.delays = {0: 0.08, 1: 0.05}
        async with (
            serving() as address,
            SessionClient(address) as client,
            await client.open(seed=3, prompt="a hall", start="yard", credits=1) as session,
        ):
            assert (session.session_id, session.model.name, session.model.chunk_seconds) == ("s1", "flat", 0.1)
            chunks = aiter(session)
            first = await anext(chunks)
            ids = [session.control(["w"]), session.control(["w", "l"], yaw=-20)]
            session.grant()
            second = await anext(chunks)
        assert first.frames.shape == (8, 16, 24, 3)
        assert (first.action_to_frame, first.last_control) == ((), 0)
        assert np.unique(second.frames) == [1]
        assert (second.index, second.last_control, second.server.denoise) == (1, ids[1], 0.03)
        assert [0.05 <= latency < 1 for latency in second.action_to_frame] == [True, True]
        assert session.time_to_first_frame is not None
        assert 0.08 <= session.time_to_first_frame < 1

    asyncio.run(scenario())
    assert (service.opened.seed, service.opened.prompt, service.opened.start_name) == (3, "a hall", "yard")
    assert service.controls[1] == pb.Control(id=2, move=pb.Move(keys=["w"]), look=pb.Look(keys=["l"], yaw=-20))
    assert service.closed


def test_playing_keeps_the_pace_and_grants_no_more_than_the_window(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        async with serving() as address, SessionClient(address) as client, await client.open() as session:
            shown, ahead = [], []
            async for played in session.play(5):
                shown.append(time.monotonic())
                ahead.append(service.granted - played.chunk.index)
        assert np.diff(shown).min() > 0.9 * CHUNK_SECONDS  # only a busy machine makes it longer
        assert max(ahead) <= 2
        assert service.sent == 5

    asyncio.run(scenario())


def test_a_control_sent_while_a_chunk_is_shown_applies_to_the_next(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        async with serving() as address, SessionClient(address) as client, await client.open() as session:
            sent = 0
            async for played in session.play(4):
                assert played.chunk.last_control == sent
                sent = session.control(["w"])

    asyncio.run(scenario())


def test_a_chunk_that_comes_after_its_turn_is_late_and_the_pace_goes_on_from_it(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        service.delays = {2: 0.25}
        async with serving() as address, SessionClient(address) as client, await client.open() as session:
            late = [played.late async for played in session.play(4)]
        assert late[0] == 0
        assert 0.1 < late[2] == max(late)

    asyncio.run(scenario())


def test_a_refusal_is_a_session_error_with_the_servers_words(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        service.refusal = "all 2 session slots are taken"
        async with serving() as address, SessionClient(address) as client:
            with pytest.raises(SessionError, match=r"all 2 session slots are taken \(UNAVAILABLE\)"):
                await client.open()

    asyncio.run(scenario())


def test_a_server_that_is_not_there_is_a_session_error_with_its_address(unused_port: int) -> None:
    async def scenario() -> None:
        async with SessionClient(f"127.0.0.1:{unused_port}") as client:
            for attempt in (client.models(), client.open()):
                with pytest.raises(SessionError, match=f"127.0.0.1:{unused_port}: no session service answers"):
                    await attempt

    asyncio.run(scenario())


def test_an_end_that_the_client_did_not_ask_for_is_an_error(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        service.end_after, service.end = 1, pb.END_REASON_IDLE
        async with serving() as address, SessionClient(address) as client, await client.open() as session:
            with pytest.raises(SessionError, match="the server ended the session"):
                async for _ in session.play():
                    pass

    asyncio.run(scenario())


def test_an_unknown_key_is_refused_before_it_is_sent(serving: Serving, service: Any) -> None:
    async def scenario() -> None:
        async with serving() as address, SessionClient(address) as client, await client.open() as session:
            with pytest.raises(SessionError, match="unknown key 'q', expected some of w s a d u dn j l i k"):
                session.control(["w", "q"])

    asyncio.run(scenario())
    assert service.controls == []
