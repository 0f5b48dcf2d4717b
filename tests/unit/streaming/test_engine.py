"""The streaming engine: what a session's frames depend on, and what they do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minwm.errors import ConfigError, SessionError, TrajectoryError
from minwm.geometry.live import CameraVelocity
from minwm.streaming import Session, StreamingEngine, load_world

pytestmark = pytest.mark.unit

FORWARD, RIGHT, STILL = CameraVelocity(forward=4.0), CameraVelocity(yaw=60.0), CameraVelocity()
CHUNKS = 4  # the window is two chunks: the later ones are past eviction

Frames = NDArray[np.uint8]


@pytest.fixture
def engine(tiny_world: Path) -> StreamingEngine:
    return StreamingEngine(load_world(tiny_world, torch.float32), slots=3)


def play(engine: StreamingEngine, session: Session, controls: list[CameraVelocity]) -> list[Frames]:
    return [engine.advance(session, control).frames for control in controls]


def fresh(
    engine: StreamingEngine, controls: list[CameraVelocity], seed: int = 1, prompt: str = "a hall"
) -> list[Frames]:
    """The chunks of a session of its own."""
    session = engine.open(seed=seed, prompt=prompt, start_image="hall")
    frames = play(engine, session, controls)
    engine.close(session)
    return frames


def same(one: list[Frames], other: list[Frames]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_spec_says_what_a_client_needs(engine: StreamingEngine) -> None:
    spec = engine.spec
    assert (spec.model, spec.height, spec.width, spec.fps) == ("tiny", 32, 48, 17.5)
    assert spec.frames_per_chunk == 8
    assert spec.chunk_seconds == pytest.approx(8 / 17.5)
    assert spec.start_images == ("hall", "yard")


def test_chunks_come_numbered_with_frames_and_timings(engine: StreamingEngine) -> None:
    session = engine.open(seed=1)
    for index in range(3):
        chunk = engine.advance(session, FORWARD)
        assert chunk.index == index
        assert chunk.frames.shape == (8, 32, 48, 3)
        assert chunk.frames.dtype == np.uint8
        assert chunk.denoise_seconds > 0
        assert chunk.decode_seconds > 0


def test_frames_are_a_function_of_seed_prompt_picture_and_controls(engine: StreamingEngine) -> None:
    controls = [FORWARD, RIGHT, STILL, FORWARD]
    frames = fresh(engine, controls)
    assert same(fresh(engine, controls), frames)
    assert not same(fresh(engine, controls, seed=2), frames)
    assert not same(fresh(engine, controls, prompt="a yard"), frames)
    yard = engine.open(seed=1, prompt="a hall", start_image="yard")
    assert not same(play(engine, yard, controls), frames)


@pytest.mark.parametrize("changed", range(CHUNKS))
def test_a_control_changes_the_frames_from_its_own_chunk_on(engine: StreamingEngine, changed: int) -> None:
    controls = [FORWARD] * CHUNKS
    plain = fresh(engine, controls)
    controls[changed] = RIGHT
    turned = fresh(engine, controls)
    assert same(turned[:changed], plain[:changed])
    assert all(not np.array_equal(a, b) for a, b in zip(turned[changed:], plain[changed:], strict=True))


def test_settling_before_or_inside_the_next_advance_gives_the_same_frames(engine: StreamingEngine) -> None:
    controls = [FORWARD, RIGHT, STILL, FORWARD]
    inside = fresh(engine, controls)
    session = engine.open(seed=1, prompt="a hall", start_image="hall")
    before = []
    for control in controls:
        before.append(engine.advance(session, control).frames)
        engine.settle(session)
        engine.settle(session)  # a second time does nothing
    assert same(before, inside)


@pytest.mark.parametrize("shuffle", range(3))
def test_sessions_do_not_notice_each_other_in_any_order(engine: StreamingEngine, shuffle: int) -> None:
    controls = {1: [FORWARD, RIGHT, STILL, FORWARD], 2: [RIGHT, RIGHT, FORWARD, STILL]}
    alone = {seed: fresh(engine, controls[seed], seed=seed) for seed in controls}
    sessions = {seed: engine.open(seed=seed, prompt="a hall", start_image="hall") for seed in controls}
    together: dict[int, list[Frames]] = {1: [], 2: []}
    random = np.random.default_rng(shuffle)
    for seed in random.permutation([1, 2] * 4).tolist():
        together[seed].append(engine.advance(sessions[seed], controls[seed][len(together[seed])]).frames)
        if random.random() < 0.5:
            engine.settle(sessions[seed])
    assert all(same(together[seed], alone[seed]) for seed in controls)


def test_noise_depends_on_seed_frame_and_step_and_not_on_the_chunk(engine: StreamingEngine) -> None:
    draws = {
        (seed, frame, step): engine._noise(seed, frame, 1, step)
        for seed in (1, 2)
        for frame in range(4)
        for step in range(2)
    }
    assert len({noise.numpy().tobytes() for noise in draws.values()}) == len(draws)
    for seed, frame, step in [(1, 0, 0), (2, 1, 1), (1, 2, 0)]:
        together = engine._noise(seed, frame, 2, step)
        assert torch.equal(together, torch.cat([draws[seed, frame, step], draws[seed, frame + 1, step]], 1))


def test_the_camera_moves_on_at_the_commanded_velocity_for_every_frame(engine: StreamingEngine) -> None:
    """From a picture, a chunk of motion each; from nothing, the very first latent frame stands still."""
    walking = CameraVelocity(forward=3.0, right=1.0)
    for start, latent_frames in (("hall", 6), (None, 5)):
        session = engine.open(seed=1, start_image=start)
        play(engine, session, [walking] * 3)
        seconds = latent_frames * 4 / 17.5
        np.testing.assert_allclose(session.pose[:3, 3], [1.0 * seconds, 0, 3.0 * seconds], atol=1e-9)
        play(engine, session, [RIGHT])
        turned = np.radians(60.0 * 8 / 17.5)
        np.testing.assert_allclose(session.pose[:3, 2], [np.sin(turned), 0, np.cos(turned)], atol=1e-9)
        engine.close(session)


def test_slots_are_freed_by_closing(engine: StreamingEngine) -> None:
    sessions = [engine.open(seed=seed) for seed in range(3)]
    assert engine.free_slots == 0
    with pytest.raises(SessionError, match="no slot is free: all 3 are in use"):
        engine.open(seed=9)
    engine.close(sessions[1])
    engine.close(sessions[1])  # twice is allowed, and frees one slot only
    assert engine.free_slots == 1
    engine.open(seed=9)
    assert engine.free_slots == 0
    with pytest.raises(SessionError, match="closed"):
        engine.advance(sessions[1], FORWARD)


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        ("cellar", r"start image 'cellar': unknown, the model has \['hall', 'yard'\]"),
        (np.zeros((32, 48), np.uint8), r"start image: uint8 of shape \(32, 48\), expected uint8 \(y, x, 3\)"),
        (np.zeros((32, 48, 4), np.uint8), r"shape \(32, 48, 4\)"),
        (np.zeros((32, 48, 3), np.float32), "float32"),
        (np.zeros((0, 48, 3), np.uint8), r"shape \(0, 48, 3\)"),
    ],
)
def test_a_bad_start_image_is_refused_and_takes_no_slot(
    engine: StreamingEngine, start: Frames | str, complaint: str
) -> None:
    with pytest.raises(SessionError, match=complaint):
        engine.open(seed=0, start_image=start)
    assert engine.free_slots == 3


def test_a_picture_by_name_or_given_is_the_same_start(engine: StreamingEngine, tiny_world: Path) -> None:
    picture = load_world(tiny_world).starts["hall"]
    named, given = engine.open(seed=1, start_image="hall"), engine.open(seed=1, start_image=picture)
    assert same(play(engine, named, [FORWARD] * 2), play(engine, given, [FORWARD] * 2))


def test_a_larger_picture_is_averaged_down_to_the_model_s_size(engine: StreamingEngine, tiny_world: Path) -> None:
    picture = load_world(tiny_world).starts["hall"]
    doubled = picture.repeat(2, axis=0).repeat(2, axis=1)
    one, other = engine.open(seed=1, start_image=picture), engine.open(seed=1, start_image=doubled)
    assert same(play(engine, one, [FORWARD] * 2), play(engine, other, [FORWARD] * 2))


def test_a_world_can_start_from_nothing(engine: StreamingEngine) -> None:
    from_nothing = play(engine, engine.open(seed=1, prompt="a hall"), [FORWARD] * 2)
    assert not same(from_nothing, fresh(engine, [FORWARD] * 2))


def test_fewer_steps_give_other_frames_and_unknown_counts_are_refused(tiny_world: Path) -> None:
    world = load_world(tiny_world, torch.float32)
    one, two = (fresh(StreamingEngine(world, 1, steps=steps), [FORWARD]) for steps in (1, 2))
    assert same(two, fresh(StreamingEngine(world, 1), [FORWARD])), "the card's own steps"
    assert not same(one, two)
    with pytest.raises(ConfigError, match=r"steps=3: tiny samples in one of \[1, 2, 4\] steps"):
        StreamingEngine(world, 1, steps=3)


def test_a_velocity_that_is_not_a_number_never_reaches_the_pose() -> None:
    with pytest.raises(TrajectoryError, match="forward=nan"):
        CameraVelocity(forward=float("nan"))


def test_bf16_worlds_run_too(tiny_world: Path) -> None:
    engine = StreamingEngine(load_world(tiny_world), slots=1)
    assert same(fresh(engine, [FORWARD, RIGHT]), fresh(engine, [FORWARD, RIGHT]))
