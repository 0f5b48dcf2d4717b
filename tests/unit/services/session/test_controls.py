"""Controls: ids only grow, the latest wins on each track, a snapshot never changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.client.keys import LOOK_KEYS, MOVE_KEYS
from minwm.client.v1 import session_pb2 as pb
from minwm.geometry.live import Speeds, velocity_from_keys
from minwm.geometry.trajectory import KEYS
from minwm_session.controls import Controls
from minwm_session.errors import ProtocolError

pytestmark = pytest.mark.unit

SPEEDS = Speeds(move=3.0, turn=60.0)
RATES = st.floats(-50, 50)

moves = st.builds(pb.Move, keys=st.lists(st.sampled_from(MOVE_KEYS)), forward=RATES, right=RATES, up=RATES)
looks = st.builds(pb.Look, keys=st.lists(st.sampled_from(LOOK_KEYS)), yaw=RATES, pitch=RATES)
controls = st.builds(pb.Control, id=st.integers(1, 12), move=st.none() | moves, look=st.none() | looks)


def test_the_two_tracks_share_the_grammars_keys_out() -> None:
    assert sorted(MOVE_KEYS + LOOK_KEYS) == sorted(KEYS)
    assert set(LOOK_KEYS) == {"i", "j", "k", "l"}


@given(st.lists(controls, max_size=12))
def test_receipts_and_velocity_follow_the_highest_id_so_far(sent: list[pb.Control]) -> None:
    state = Controls(SPEEDS)
    last, move, look = 0, pb.Move(), pb.Look()
    for time, control in enumerate(sent):
        before = state.current
        status = state.accept(control, float(time))
        if control.id <= last:
            duplicate = control.id == last
            assert status == (pb.ControlAck.STATUS_DUPLICATE if duplicate else pb.ControlAck.STATUS_STALE)
            assert state.current is before
            continue
        assert status == pb.ControlAck.STATUS_ACCEPTED
        last = control.id
        move = control.move if control.HasField("move") else move
        look = control.look if control.HasField("look") else look
        held = velocity_from_keys([*move.keys, *look.keys], SPEEDS)
        velocity = state.current.velocity
        assert state.current.control_id == last
        assert velocity.forward == pytest.approx(held.forward + move.forward)
        assert velocity.right == pytest.approx(held.right + move.right)
        assert velocity.up == pytest.approx(held.up + move.up)
        assert velocity.yaw == pytest.approx(held.yaw + look.yaw)
        assert velocity.pitch == pytest.approx(held.pitch + look.pitch)


def test_arrival_times_are_handed_out_once_by_the_chunk_that_applies_them() -> None:
    state = Controls(SPEEDS)
    for id, time in ((2, 0.1), (3, 0.2), (9, 0.3)):
        state.accept(pb.Control(id=id), time)
    assert state.applied(1) == []
    assert state.applied(3) == [0.1, 0.2]
    assert state.applied(9) == [0.3]
    assert state.applied(9) == []


def test_a_refused_control_changes_nothing_and_its_id_stays_free() -> None:
    state = Controls(SPEEDS)
    with pytest.raises(ProtocolError, match=r"control\.look\.keys: unknown key 'w', expected some of j l i k"):
        state.accept(pb.Control(id=1, move=pb.Move(forward=1), look=pb.Look(keys=["w"])), 0.0)
    assert state.current.control_id == 0
    assert state.accept(pb.Control(id=1, look=pb.Look(keys=["l"])), 0.0) == pb.ControlAck.STATUS_ACCEPTED
    assert (state.current.velocity.forward, state.current.velocity.yaw) == (0, 60)
