import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_H264: _ClassVar[Encoding]
    ENCODING_JPEG: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_CLOSED: _ClassVar[EndReason]
    END_REASON_IDLE: _ClassVar[EndReason]
    END_REASON_ERROR: _ClassVar[EndReason]
ENCODING_UNSPECIFIED: Encoding
ENCODING_H264: Encoding
ENCODING_JPEG: Encoding
ENCODING_RAW: Encoding
END_REASON_UNSPECIFIED: EndReason
END_REASON_CLOSED: EndReason
END_REASON_IDLE: EndReason
END_REASON_ERROR: EndReason

class ClientEvent(_message.Message):
    __slots__ = ("open", "control", "credit", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    control: Control
    credit: Credit
    close: Close
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., control: _Optional[_Union[Control, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class ServerEvent(_message.Message):
    __slots__ = ("started", "chunk", "control_ack", "ended")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ACK_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    chunk: Chunk
    control_ack: ControlAck
    ended: Ended
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., control_ack: _Optional[_Union[ControlAck, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("model", "prompt", "seed", "start_image", "start_name", "encodings", "credits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    START_IMAGE_FIELD_NUMBER: _ClassVar[int]
    START_NAME_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    seed: int
    start_image: bytes
    start_name: str
    encodings: _containers.RepeatedScalarFieldContainer[Encoding]
    credits: int
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., seed: _Optional[int] = ..., start_image: _Optional[bytes] = ..., start_name: _Optional[str] = ..., encodings: _Optional[_Iterable[_Union[Encoding, str]]] = ..., credits: _Optional[int] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("id", "move", "look")
    ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    LOOK_FIELD_NUMBER: _ClassVar[int]
    id: int
    move: Move
    look: Look
    def __init__(self, id: _Optional[int] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., look: _Optional[_Union[Look, _Mapping]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("keys", "forward", "right", "up")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    forward: float
    right: float
    up: float
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., forward: _Optional[float] = ..., right: _Optional[float] = ..., up: _Optional[float] = ...) -> None: ...

class Look(_message.Message):
    __slots__ = ("keys", "yaw", "pitch")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    YAW_FIELD_NUMBER: _ClassVar[int]
    PITCH_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    yaw: float
    pitch: float
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., yaw: _Optional[float] = ..., pitch: _Optional[float] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    def __init__(self, chunks: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Started(_message.Message):
    __slots__ = ("session_id", "model", "encoding")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: ModelSpec
    encoding: Encoding
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[_Union[ModelSpec, _Mapping]] = ..., encoding: _Optional[_Union[Encoding, str]] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("name", "height", "width", "frames_per_second", "frames_per_chunk", "move_speed", "turn_speed", "start_images")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    MOVE_SPEED_FIELD_NUMBER: _ClassVar[int]
    TURN_SPEED_FIELD_NUMBER: _ClassVar[int]
    START_IMAGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    height: int
    width: int
    frames_per_second: float
    frames_per_chunk: int
    move_speed: float
    turn_speed: float
    start_images: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., frames_per_second: _Optional[float] = ..., frames_per_chunk: _Optional[int] = ..., move_speed: _Optional[float] = ..., turn_speed: _Optional[float] = ..., start_images: _Optional[_Iterable[str]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("index", "presentation_time", "last_control_id", "encoding", "frames", "timings")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PRESENTATION_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_CONTROL_ID_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    index: int
    presentation_time: _duration_pb2.Duration
    last_control_id: int
    encoding: Encoding
    frames: _containers.RepeatedScalarFieldContainer[bytes]
    timings: Timings
    def __init__(self, index: _Optional[int] = ..., presentation_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_control_id: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., frames: _Optional[_Iterable[bytes]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue", "denoise", "decode", "encode")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    DENOISE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    queue: _duration_pb2.Duration
    denoise: _duration_pb2.Duration
    decode: _duration_pb2.Duration
    encode: _duration_pb2.Duration
    def __init__(self, queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., denoise: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ControlAck(_message.Message):
    __slots__ = ("id", "status")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[ControlAck.Status]
        STATUS_ACCEPTED: _ClassVar[ControlAck.Status]
        STATUS_DUPLICATE: _ClassVar[ControlAck.Status]
        STATUS_STALE: _ClassVar[ControlAck.Status]
    STATUS_UNSPECIFIED: ControlAck.Status
    STATUS_ACCEPTED: ControlAck.Status
    STATUS_DUPLICATE: ControlAck.Status
    STATUS_STALE: ControlAck.Status
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    id: int
    status: ControlAck.Status
    def __init__(self, id: _Optional[int] = ..., status: _Optional[_Union[ControlAck.Status, str]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: EndReason
    def __init__(self, reason: _Optional[_Union[EndReason, str]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelSpec]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelSpec, _Mapping]]] = ...) -> None: ...
