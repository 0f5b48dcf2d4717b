"""Sessions that the streaming benchmarks time, and what they are asked for."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minwm.errors import SessionError
from minwm.geometry.live import CameraVelocity
from minwm.models.context import History
from minwm.models.costs import latent_size
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import World
from minwm.streaming import Chunk, Fidelity, Session, StreamingEngine, Turn
from minwm.streaming.snapshot import read, restore, take
from minwm.streaming.snapshot import write as write_snapshot
from models import Device, settle

VELOCITY = CameraVelocity(forward=1.0, yaw=10.0)


@dataclass(frozen=True)
class Workload:
    """What one row of figures is of."""

    world: World
    fidelity: Fidelity
    sessions: int
    device: Device
    compiled: bool = False
    eight_bit: bool = False

    @property
    def history(self) -> History:
        """What a chunk sees at this fidelity."""
        return replace(self.world.backbone.config.history, window=self.fidelity.window)

    @property
    def latents(self) -> tuple[int, int]:
        """Rows and columns."""
        return latent_size(self.world.backbone.config.architecture, self.world.card.height, self.world.card.width)

    @property
    def frames(self) -> int:
        """RGB frames of one chunk, of all sessions."""
        return self.sessions * self.history.chunk * FRAMES_PER_LATENT

    def noise(self, frames: int) -> Tensor:
        """Latents of all sessions."""
        model = self.world.backbone.model
        shape = (self.sessions, frames, model.architecture.channels, *self.latents)
        return torch.randn(shape, dtype=next(model.parameters()).dtype, device=self.device.value)


class Streams:
    """Sessions that advance together: all that this benchmark asks of the engine.

    parts: seconds that each `advance` took to denoise and to decode
    """

    def __init__(self, work: Workload, *, fuse: bool = False) -> None:
        """fuse: write a chunk's context in one pass with the next one's first step, where it is not settled."""
        self._work = work
        self._engine = StreamingEngine(
            work.world,
            work.sessions + 1,
            fuse_context=fuse,
            compiled=work.compiled,
            eight_bit_products=work.eight_bit,
        )
        self._sessions: list[Session] = []
        self.parts: list[tuple[float, float]] = []

    def open(self) -> None:
        """New sessions in place of those that were."""
        for session in self._sessions:
            self._engine.close(session)
        self._sessions = [
            self._engine.open(seed=number, prompt=f"world {number}") for number in range(self._work.sessions)
        ]

    def advance(self) -> None:
        """The next chunk of every session, to its frames."""
        turns = [Turn(session, VELOCITY, fidelity=self._work.fidelity) for session in self._sessions]
        made = self._engine.advance(turns)
        chunks = [one for one in made if isinstance(one, Chunk)]
        if len(chunks) < len(made):
            raise next(one for one in made if isinstance(one, SessionError))
        self.parts.append((max(one.denoise_seconds for one in chunks), max(one.decode_seconds for one in chunks)))

    def settle(self) -> None:
        """Its clean context."""
        self._engine.settle(self._sessions)

    @property
    def bytes_per_session(self) -> int:
        """What an open session keeps."""
        return self._engine.bytes_per_session

    def kept(self) -> dict[str, float]:
        """Size of a session's snapshot, and milliseconds to take, write, read and restore it."""
        engine, spent, began = self._engine, {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal began
            settle(self._work.device)
            spent[f"{name}_ms"], began = 1e3 * (time.perf_counter() - began), time.perf_counter()

        snapshot = take(engine, self._sessions[0])
        lap("snapshot")
        with TemporaryDirectory() as folder:
            write_snapshot(snapshot, Path(folder) / "kept")
            lap("snapshot_write")
            snapshot = read(Path(folder) / "kept")
            lap("snapshot_read")
        session = restore(engine, snapshot)
        lap("restore")
        engine.close(session)
        return {"snapshot_bytes": snapshot.nbytes, **spent}
