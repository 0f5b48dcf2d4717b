"""Does a chunk take longer the longer its session has gone on?"""

import math
import statistics
import time
from dataclasses import replace
from typing import Any

from streaming_sessions import VELOCITY, Streams, Workload

from minwm.streaming import Chunk, Session, StreamingEngine, Turn
from minwm.streaming.snapshot import Snapshot, restore, take
from models import in_turn, settle

POINTS = 50  # of the curve
YOUNG = 100  # chunks
ROUNDS = 10  # timings for each that is asked for: the difference is a matter of percents


def over_length(work: Workload, frames: int) -> dict[str, Any]:
    """Milliseconds of a chunk of one session of so many RGB frames: medians over stretches of it, by where they end."""
    streams, spent = Streams(work), []
    streams.open()
    for _ in range(max(1, frames // work.frames)):
        settle(work.device)
        started = time.perf_counter()
        streams.advance()
        streams.settle()
        settle(work.device)
        spent.append(1e3 * (time.perf_counter() - started))
    size = -(-len(spent) // POINTS)
    stretches = [spent[start : start + size] for start in range(0, len(spent), size)]
    return {
        "preset": work.world.backbone.config.preset,
        "height": work.world.card.height,
        "width": work.world.card.width,
        "steps": work.fidelity.steps,
        "window": work.fidelity.window,
        "frames": [min((number + 1) * size, len(spent)) * work.frames for number in range(len(stretches))],
        "chunk_ms": [statistics.median(stretch) for stretch in stretches],
    }


def far_along(work: Workload, chunks: int, repeats: int) -> dict[str, float]:
    """A chunk of a session after 100 chunks, and of the same session with its counters moved on by `chunks`.

    They are timed in turn. All that depends on how far a session is follows from its counters: positions, noise, and
    where the ring is written. Milliseconds, and the later over the earlier.
    """
    engine = StreamingEngine(work.world, 2, compiled=work.compiled, eight_bit_products=work.eight_bit)

    def go_on(session: Session) -> None:
        (made,) = engine.advance([Turn(session, VELOCITY, work.fidelity)])
        if not isinstance(made, Chunk):
            raise made
        engine.settle([session])

    young = engine.open(seed=1)
    for _ in range(YOUNG):
        go_on(young)
    window, chunk = work.world.backbone.config.history.window, work.history.chunk
    ring = math.lcm(window, chunk) // chunk  # chunks after which frames lie where they lay
    old = restore(engine, aged(take(engine, young), -(-chunks // ring) * ring, chunk))
    rounds = in_turn({"young": lambda: go_on(young), "old": lambda: go_on(old)}, work.device, ROUNDS * repeats)
    early, late = statistics.median(rounds["young"]), statistics.median(rounds["old"])
    return {"far": chunks, "early_chunk_ms": 1e3 * early, "late_chunk_ms": 1e3 * late, "late_over_early": late / early}


def aged(snapshot: Snapshot, chunks: int, chunk: int) -> Snapshot:
    """The session as if it had made so many chunks more to come where it is."""
    frames, header, tensors = chunks * chunk, snapshot.header, dict(snapshot.tensors)
    for name in tensors:
        if name == "cache.end" or (name.startswith("kept.") and name.endswith(".start")):
            tensors[name] = tensors[name] + frames
    moved = {name: getattr(header, name) + frames for name in ("frames", "anchored")}
    return Snapshot(replace(header, chunks=header.chunks + chunks, **moved), tensors)
