"""What a stream can fail with, and the one table that maps exceptions to gRPC status.

SessionError (minwm.errors)
├── ProtocolError      a message makes no sense: names the field
├── UnknownModelError  the model is not served here
├── NoFreeSlotError    every session slot is taken
└── OpenTimeoutError   the stream did not start with `open` in time
"""

import logging
import uuid
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from minwm.errors import InputError, MinwmError, SessionError, TrajectoryError

logger = logging.getLogger(__name__)

DOMAIN = "minwm"
RETRY_SECONDS = 5


class ProtocolError(SessionError):
    """A message makes no sense. `field` is its path, such as control.move.forward."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class UnknownModelError(SessionError):
    """The model is not served here."""


class NoFreeSlotError(SessionError):
    """Every session slot is taken."""


class OpenTimeoutError(SessionError):
    """The stream did not start with `open` in time."""


@dataclass(frozen=True)
class _Mapping:
    code: StatusCode
    reason: str


# The first class that an exception is an instance of decides.
_TABLE: dict[type[MinwmError], _Mapping] = {
    ProtocolError: _Mapping(StatusCode.INVALID_ARGUMENT, "INVALID_MESSAGE"),
    UnknownModelError: _Mapping(StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    NoFreeSlotError: _Mapping(StatusCode.UNAVAILABLE, "NO_FREE_SLOT"),
    OpenTimeoutError: _Mapping(StatusCode.DEADLINE_EXCEEDED, "OPEN_TIMEOUT"),
    TrajectoryError: _Mapping(StatusCode.INVALID_ARGUMENT, "INVALID_CONTROL"),
    InputError: _Mapping(StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    MinwmError: _Mapping(StatusCode.FAILED_PRECONDITION, "SESSION_FAILED"),
}
_INTERNAL = _Mapping(StatusCode.INTERNAL, "INTERNAL")


def to_status(error: Exception) -> tuple[StatusCode, Status]:
    """The status an exception ends a stream with, with ErrorInfo and what else its kind has.

    Anything that is not a MinwmError is our bug: it is logged under a reference, which is all the client is told.
    """
    mapping = next((found for kind, found in _TABLE.items() if isinstance(error, kind)), _INTERNAL)
    message = str(error)
    if mapping is _INTERNAL:
        reference = uuid.uuid4().hex[:12]
        logger.error("internal error %s", reference, exc_info=error)
        message = f"internal error, reference {reference}"
    status = Status(code=mapping.code.value[0], message=message)
    status.details.add().Pack(ErrorInfo(reason=mapping.reason, domain=DOMAIN))
    if isinstance(error, ProtocolError):
        violation = BadRequest.FieldViolation(field=error.field, description=error.problem)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if isinstance(error, NoFreeSlotError):
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS)))
    return mapping.code, status
