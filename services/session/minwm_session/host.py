"""What the streams of one replica share: the engine, the one thread it runs on, metrics, limits.

Engine calls block and must come one at a time, so sessions take turns on that thread, first come first served.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from prometheus_client import CollectorRegistry

from minwm.client.v1 import session_pb2 as pb
from minwm.errors import SessionError
from minwm.geometry.live import CameraVelocity
from minwm.streaming import Chunk, Session, StreamingEngine, StreamSpec, Turn, warm_up
from minwm_session.errors import NoFreeSlotError
from minwm_session.metrics import Metrics
from minwm_session.opening import Opening

T = TypeVar("T")
logger = logging.getLogger(__name__)


class SessionHost:
    """One engine behind one thread."""

    def __init__(
        self, load: Callable[[], StreamingEngine], *, idle_seconds: float, registry: CollectorRegistry
    ) -> None:
        """load: makes the engine, on the engine's thread.

        Nothing else may compute with PyTorch: for every thread that does, OpenMP keeps a team of its own, and with more
        teams than cores waits for each operation asleep, which takes twice as long.
        """
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.engine = self._executor.submit(load).result()
        self.idle_seconds = idle_seconds
        self.metrics = Metrics(registry)
        self._slots = self.engine.free_slots
        self._count()

    @property
    def spec(self) -> StreamSpec:
        """The model's description."""
        return self.engine.spec

    def describe_model(self) -> pb.ModelSpec:
        """The model's description as a message."""
        spec = self.spec
        return pb.ModelSpec(
            name=spec.model,
            height=spec.height,
            width=spec.width,
            frames_per_second=spec.fps,
            frames_per_chunk=spec.frames_per_chunk,
            move_speed=spec.speeds.move,
            turn_speed=spec.speeds.turn,
            start_images=spec.start_images,
        )

    async def run(self, job: Callable[[], T]) -> T:
        """Run `job` on the engine's thread. Cancelled, it is dropped if it had not begun, else it runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, job)

    async def open(self, opening: Opening) -> Session:
        """Open a session. Raises NoFreeSlotError; whatever the caller's fate, no slot is left behind."""
        future = self._executor.submit(self._open, opening)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._close_unclaimed)
            raise

    def close(self, session: Session) -> None:
        """Free the session's slot as soon as the engine's thread is through with what it is doing."""
        self._executor.submit(self._close, session).add_done_callback(_log_failure)

    def advance(self, session: Session, velocity: CameraVelocity) -> Chunk:
        """The session's next chunk, on the engine's thread. Raises SessionError."""
        (result,) = self.engine.advance([Turn(session, velocity)])
        if isinstance(result, SessionError):
            raise result
        return result

    def warm_up(self) -> None:
        """Make what the first client would wait for otherwise, and say how long it took."""
        seconds = sum(self._executor.submit(warm_up, self.engine).result().values())
        self.metrics.warm_up.set(seconds)
        logger.info("warmed up in %.1f s", seconds)

    def _open(self, opening: Opening) -> Session:
        if self.engine.free_slots == 0:
            raise NoFreeSlotError(f"all {self._slots} session slots are taken, try again later")
        session = self.engine.open(seed=opening.seed, prompt=opening.prompt, start_image=opening.start)
        self._count()
        return session

    def _close(self, session: Session) -> None:
        self.engine.close(session)
        self._count()

    def _close_unclaimed(self, opened: "Future[Session]") -> None:
        if not opened.cancelled() and opened.exception() is None:
            self.close(opened.result())

    def _count(self) -> None:
        free = self.engine.free_slots
        self.metrics.count_sessions(used=self._slots - free, free=free)


def _log_failure(closing: "Future[None]") -> None:
    if not closing.cancelled() and (error := closing.exception()) is not None:
        logger.error("a session could not be closed", exc_info=error)
