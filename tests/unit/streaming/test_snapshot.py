"""Sessions as data: gone on with elsewhere bit for bit, and refused when damaged or foreign."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minwm.errors import SessionError
from minwm.geometry.live import CameraVelocity
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.context import History
from minwm.streaming import Chunk, Fidelity, Session, StreamingEngine, Turn, load_world
from minwm.streaming.snapshot import HEADER, TENSORS, read, restore, take, write

pytestmark = pytest.mark.unit

PATH = [CameraVelocity(forward=20.0, yaw=30.0), CameraVelocity(yaw=-60.0), CameraVelocity(right=9.0)]


@pytest.fixture
def engine(tiny_world: Path) -> StreamingEngine:
    return StreamingEngine(load_world(tiny_world), slots=3)


def play(engine: StreamingEngine, session: Session, chunks: int, first: int = 0) -> list[NDArray[np.uint8]]:
    frames = []
    for number in range(first, first + chunks):
        fidelity = Fidelity(window=2) if number % 5 == 4 else Fidelity()
        (result,) = engine.advance([Turn(session, PATH[number % 3], fidelity)])
        assert isinstance(result, Chunk)
        assert result.index == number
        frames.append(result.frames)
    return frames


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("before", [0, 1, 9])
def test_a_restored_session_goes_on_bit_for_bit(engine: StreamingEngine, before: int, settled: bool) -> None:
    session = engine.open(seed=5, prompt="a hall", start_image="hall")
    play(engine, session, before)
    if settled:
        engine.settle([session])
    snapshot = take(engine, session)
    expected = play(engine, session, 6, before)
    restored = restore(engine, snapshot)
    assert all(np.array_equal(a, b) for a, b in zip(play(engine, restored, 6, before), expected, strict=True))
    np.testing.assert_array_equal(restored.pose, session.pose)
    again = restore(engine, snapshot)
    assert np.array_equal(play(engine, again, 1, before)[0], expected[0]), "a snapshot is its own: use leaves it alone"


def test_another_process_goes_on_with_the_file_for_twenty_chunks(
    engine: StreamingEngine, tiny_world: Path, tmp_path: Path
) -> None:
    session = engine.open(seed=5, prompt="a hall", start_image="hall")
    play(engine, session, 7)
    write(take(engine, session), tmp_path / "kept")
    np.save(tmp_path / "expected.npy", np.stack(play(engine, session, 20, 7)))
    command = [sys.executable, __file__, str(tiny_world), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)


def test_a_fork_shares_the_past_and_has_a_future_of_its_own(engine: StreamingEngine) -> None:
    session = engine.open(seed=5, prompt="a hall", start_image="hall")
    play(engine, session, 3)
    snapshot = take(engine, session)
    same, other = restore(engine, snapshot), restore(engine, snapshot, seed=6)
    expected = play(engine, session, 2, 3)
    assert np.array_equal(play(engine, same, 2, 3)[0], expected[0])
    assert not np.array_equal(play(engine, other, 2, 3)[0], expected[0])


def test_a_sink_a_prompt_and_a_moved_origin_come_back(
    new_backbone: Callable[..., Backbone], tiny_world: Path, tmp_path: Path
) -> None:
    backbone = new_backbone(History(chunk=2, window=4, sink=1, sink_reach=5.0))
    save_backbone(tmp_path / "sinking", backbone, {})
    for name in ("config.json", "model.safetensors"):
        (tiny_world / "backbone" / name).write_bytes((tmp_path / "sinking" / name).read_bytes())
    engine = StreamingEngine(load_world(tiny_world), slots=2)
    session = engine.open(seed=5, prompt="a hall", start_image="hall")
    play(engine, session, 6)
    engine.change_prompt(session, "a yard")
    assert np.abs(session.origin - np.eye(4)).max() > 1, "the test needs an origin that moved"
    write(take(engine, session), tmp_path / "kept")
    restored = restore(engine, read(tmp_path / "kept"))
    assert restored.caption == "a yard"
    assert all(
        np.array_equal(a, b) for a, b in zip(play(engine, restored, 4, 6), play(engine, session, 4, 6), strict=True)
    )


def _cut(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-7])


def _flip(folder: Path) -> None:
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header = json.loads((folder / HEADER).read_text())
        header = {name: value for name, value in {**header, **changes}.items() if value is not None}
        (folder / HEADER).write_text(json.dumps(header))

    return edit


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_cut, "is damaged, its checksum is"),
        (_flip, "is damaged, its checksum is"),
        (_edit(version=2), "is of version 2, expected 1"),
        (_edit(sha256=None), "cannot be read"),
        (_edit(surprise=1), "cannot be read"),
        (_edit(fingerprint="0" * 64), r"is of model tiny \(000000000000\), expected tiny"),
        (lambda folder: (folder / HEADER).write_text("{"), "cannot be read"),
        (lambda folder: (folder / TENSORS).unlink(), "cannot be read"),
    ],
)
def test_a_damaged_or_foreign_snapshot_is_refused_with_the_reason_and_takes_no_slot(
    engine: StreamingEngine, tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    session = engine.open(seed=5)
    play(engine, session, 1)
    write(take(engine, session), tmp_path / "kept")
    damage(tmp_path / "kept")
    free = engine.free_slots
    with pytest.raises(SessionError, match=complaint):
        restore(engine, read(tmp_path / "kept"))
    assert engine.free_slots == free


def test_a_snapshot_of_other_weights_is_foreign(
    engine: StreamingEngine, tiny_world: Path, new_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    snapshot = take(engine, engine.open(seed=5))
    save_backbone(tmp_path / "other", new_backbone(seed=9), {})
    (tiny_world / "backbone/model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(SessionError, match=r"is of model tiny .*, expected tiny"):
        restore(StreamingEngine(load_world(tiny_world), slots=1), snapshot)


def test_no_slot_no_closed_session_and_no_folder_that_exists(engine: StreamingEngine, tmp_path: Path) -> None:
    sessions = [engine.open(seed=seed) for seed in range(3)]
    snapshot = take(engine, sessions[0])
    with pytest.raises(SessionError, match="no slot is free: all 3 are in use"):
        restore(engine, snapshot)
    engine.close(sessions[1])
    with pytest.raises(SessionError, match="the session is closed"):
        take(engine, sessions[1])
    write(snapshot, tmp_path / "kept")
    with pytest.raises(SessionError, match="kept exists, expected a new folder"):
        write(snapshot, tmp_path / "kept")
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in read(tmp_path / "kept").tensors.values())


def main(world: Path, folder: Path) -> None:
    """What the other process does."""
    torch.set_num_threads(1)  # as the tests have it: a sum's parts depend on the threads
    engine = StreamingEngine(load_world(world), slots=1)
    found = np.stack(play(engine, restore(engine, read(folder / "kept")), 20, 7))
    np.testing.assert_array_equal(found, np.load(folder / "expected.npy"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
