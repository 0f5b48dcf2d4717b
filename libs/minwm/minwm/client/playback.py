"""A trajectory played live against a session service: one step's keys for one chunk, at the model's pace.

Keys are pressed as a person presses them, at a random moment while the chunk before is shown, so the
action-to-frame times hold the wait for the next chunk. Makes a report of latencies and a video.
"""

import asyncio
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from minwm.client.overlay import draw_keys
from minwm.client.session import ClientSession, ModelInfo, PlayedChunk, SessionClient
from minwm.errors import SessionError
from minwm.geometry.trajectory import Step

Progress = Callable[[int, int], None]
_LATEST_PRESS = 0.9  # of the chunk's time: later, the network might carry a press past the next chunk's start


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Seconds."""

    p50: float
    p95: float
    max: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """What the client measured. Times in seconds; `server_seconds` are medians per chunk, by stage.

    `frames_per_second` is the pace at which frames were shown; `late_chunks` were not there when their turn came.
    """

    model: str
    chunks: int
    frames: int
    chunk_seconds: float
    time_to_first_frame_seconds: float
    action_to_frame_seconds: Quantiles
    frames_per_second: float
    late_chunks: int
    server_seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Playback:
    """A played session: its chunks, the keys that were applied to each, and the report."""

    model: ModelInfo
    played: tuple[PlayedChunk, ...]
    keys: tuple[frozenset[str], ...]
    report: LatencyReport


async def play_trajectory(
    address: str,
    steps: Sequence[Step],
    *,
    model: str = "",
    prompt: str = "",
    start: str | bytes | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Playback:
    """Play `steps` on the service at `address`; `start` None is the model's first start image, if it has one.

    `progress` gets the chunks shown and their number in all. Raises SessionError when the session fails.
    """
    async with SessionClient(address) as client:
        if start is None:
            start = _first_start(await client.models(), model)
        async with await client.open(model=model, prompt=prompt, seed=seed, start=start) as session:
            return await _play(session, [step.keys for step in steps for _ in range(step.count)], seed, progress)


async def _play(
    session: ClientSession, held: Sequence[frozenset[str]], seed: int, progress: Progress | None
) -> Playback:
    pressed: dict[int, frozenset[str]] = {0: frozenset()}
    moments = random.Random(seed)
    loop = asyncio.get_running_loop()

    def press(step: int) -> None:
        pressed[session.control(held[step])] = held[step]

    press(0)
    played: list[PlayedChunk] = []
    shown_from = 0.0
    async for chunk in session.play(len(held)):
        step = len(played)
        shown_from = shown_from or loop.time()
        played.append(chunk)
        if step == 0 and len(held) > 1:
            press(1)
        if step + 2 < len(held):  # the step after next: the next chunk is granted now
            loop.call_later(moments.uniform(0, _LATEST_PRESS) * session.model.chunk_seconds, press, step + 2)
        if progress is not None:
            progress(len(played), len(held))
    if len(played) < len(held):
        raise SessionError(f"the session ended after {len(played)} of {len(held)} chunks")
    shown_seconds = loop.time() - shown_from + session.model.chunk_seconds
    return Playback(
        model=session.model,
        played=tuple(played),
        keys=tuple(pressed[chunk.chunk.last_control] for chunk in played),
        report=_report(session, played, shown_seconds),
    )


def _first_start(models: Sequence[ModelInfo], name: str) -> str | None:
    for model in models:
        if name in ("", model.name):
            return model.start_images[0] if model.start_images else None
    return None  # `open` says that there is no such model


def _report(session: ClientSession, played: Sequence[PlayedChunk], shown_seconds: float) -> LatencyReport:
    chunks = [item.chunk for item in played]
    latencies = [latency for chunk in chunks for latency in chunk.action_to_frame]
    frames = sum(len(chunk.frames) for chunk in chunks)
    stages = [asdict(chunk.server) for chunk in chunks]
    return LatencyReport(
        model=session.model.name,
        chunks=len(chunks),
        frames=frames,
        chunk_seconds=session.model.chunk_seconds,
        time_to_first_frame_seconds=session.time_to_first_frame or 0.0,
        action_to_frame_seconds=Quantiles(
            p50=float(np.quantile(latencies, 0.5)),
            p95=float(np.quantile(latencies, 0.95)),
            max=max(latencies),
            samples=len(latencies),
        ),
        frames_per_second=frames / shown_seconds,
        late_chunks=sum(item.late > 0 for item in played),
        server_seconds={stage: float(np.median([times[stage] for times in stages])) for stage in stages[0]},
    )


def write_video(playback: Playback, path: Path, progress: Progress | None = None) -> None:
    """The session as an MP4 with the applied keys drawn on it; written aside, then renamed."""
    total = len(playback.played)
    with _aside(path) as partial, av.open(partial, "w", format="mp4") as container:
        rate = Fraction(playback.model.fps).limit_denominator(1000)
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "18"})
        stream.pix_fmt = "yuv420p"
        height, width, _ = draw_keys(playback.played[0].chunk.frames[0], ()).shape
        stream.height, stream.width = height, width
        for done, (item, keys) in enumerate(zip(playback.played, playback.keys, strict=True), start=1):
            for frame in item.chunk.frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_keys(frame, keys), format="rgb24")))
            if progress is not None:
                progress(done, total)
        container.mux(stream.encode())


def write_report(report: LatencyReport, path: Path) -> None:
    """The report as JSON; written aside, then renamed."""
    with _aside(path) as partial:
        partial.write_text(json.dumps(asdict(report), indent=1) + "\n")


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if nothing fails and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
