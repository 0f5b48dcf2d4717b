"""Exceptions to gRPC status."""

import logging

import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from minwm.errors import SessionError, TrajectoryError
from minwm_session.errors import NoFreeSlotError, OpenTimeoutError, ProtocolError, UnknownModelError, to_status

pytestmark = pytest.mark.unit


def detail(status: Status, kind: type[Message]) -> Message:
    message = kind()
    assert any(packed.Unpack(message) for packed in status.details), f"no {kind.__name__} in {status}"
    return message


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ProtocolError("control.id", "0 is no id"), StatusCode.INVALID_ARGUMENT, "INVALID_MESSAGE"),
        (TrajectoryError("forward=nan"), StatusCode.INVALID_ARGUMENT, "INVALID_CONTROL"),
        (UnknownModelError("no model 'x'"), StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
        (NoFreeSlotError("all taken"), StatusCode.UNAVAILABLE, "NO_FREE_SLOT"),
        (OpenTimeoutError("too late"), StatusCode.DEADLINE_EXCEEDED, "OPEN_TIMEOUT"),
        (SessionError("the session is closed"), StatusCode.FAILED_PRECONDITION, "SESSION_FAILED"),
    ],
)
def test_each_error_has_its_code_its_message_and_its_reason(error: Exception, code: StatusCode, reason: str) -> None:
    got, status = to_status(error)
    assert (got, status.code, status.message) == (code, code.value[0], str(error))
    assert detail(status, ErrorInfo) == ErrorInfo(reason=reason, domain="minwm")


def test_a_protocol_error_names_the_field() -> None:
    _, status = to_status(ProtocolError("control.move.up", "nan is no velocity"))
    (violation,) = detail(status, BadRequest).field_violations  # type: ignore[attr-defined]
    assert (violation.field, violation.description) == ("control.move.up", "nan is no velocity")


def test_a_full_house_says_when_to_try_again() -> None:
    _, status = to_status(NoFreeSlotError("all taken"))
    assert detail(status, RetryInfo).retry_delay.seconds > 0  # type: ignore[attr-defined]


def test_a_bug_of_ours_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        code, status = to_status(RuntimeError("the password is hunter2"))
    assert code == StatusCode.INTERNAL
    assert "hunter2" not in status.message
    assert status.message.rpartition(" ")[2] in caplog.text
    assert "hunter2" in caplog.text
