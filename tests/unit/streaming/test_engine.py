"""The streaming engine: what a session's frames depend on, and what they do not."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minwm.errors import ConfigError, SessionError, TrajectoryError
from minwm.geometry.live import CameraVelocity
from minwm.streaming import Chunk, Fidelity, Session, StreamingEngine, Turn, load_world, snapshot

pytestmark = pytest.mark.unit

FORWARD, RIGHT, STILL = CameraVelocity(forward=4.0), CameraVelocity(yaw=60.0), CameraVelocity()
CHUNKS = 4  # the window is two chunks: the later ones are past eviction

Frames = NDArray[np.uint8]


@pytest.fixture
def engine(tiny_world: Path) -> StreamingEngine:
    return StreamingEngine(load_world(tiny_world, torch.float32), slots=3)


def advance(engine: StreamingEngine, session: Session, velocity: CameraVelocity, **fidelity: Any) -> Chunk:
    """A session's next chunk by itself."""
    (result,) = engine.advance([Turn(session, velocity, Fidelity(**fidelity))])
    if isinstance(result, SessionError):
        raise result
    return result


def play(engine: StreamingEngine, session: Session, controls: list[CameraVelocity]) -> list[Frames]:
    return [advance(engine, session, control).frames for control in controls]


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
        chunk = advance(engine, session, FORWARD)
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
        before.append(advance(engine, session, control).frames)
        engine.settle([session])
        engine.settle([session])  # a second time does nothing
    assert same(before, inside)


@pytest.mark.parametrize("shuffle", range(3))
def test_sessions_do_not_notice_each_other_in_any_order(engine: StreamingEngine, shuffle: int) -> None:
    controls = {1: [FORWARD, RIGHT, STILL, FORWARD], 2: [RIGHT, RIGHT, FORWARD, STILL]}
    alone = {seed: fresh(engine, controls[seed], seed=seed) for seed in controls}
    sessions = {seed: engine.open(seed=seed, prompt="a hall", start_image="hall") for seed in controls}
    together: dict[int, list[Frames]] = {1: [], 2: []}
    random = np.random.default_rng(shuffle)
    for seed in random.permutation([1, 2] * 4).tolist():
        together[seed].append(advance(engine, sessions[seed], controls[seed][len(together[seed])]).frames)
        if random.random() < 0.5:
            engine.settle([sessions[seed]])
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
        advance(engine, sessions[1], FORWARD)


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
    engine = StreamingEngine(load_world(tiny_world, torch.bfloat16), slots=1)
    assert same(fresh(engine, [FORWARD, RIGHT]), fresh(engine, [FORWARD, RIGHT]))


PATHS = {
    1: [FORWARD, RIGHT, STILL, FORWARD, RIGHT],
    2: [RIGHT, RIGHT, FORWARD, STILL, FORWARD],
    3: [STILL, FORWARD, FORWARD, RIGHT, RIGHT],
}
ROUNDING = 1  # of 255 levels, of float32 frames; matrix products round differently by batch size


def close(one: Frames, other: Frames) -> bool:
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= ROUNDING


def test_sessions_in_one_batch_get_the_frames_that_each_gets_alone(tiny_world: Path) -> None:
    """Sessions of different age, prompt, picture, steps and window; one has no picture, one is at its beginning."""
    engine = StreamingEngine(load_world(tiny_world, torch.float32), slots=7)
    specs: dict[int, dict[str, Any]] = {
        1: {"prompt": "a hall", "start_image": "hall"},
        2: {"prompt": "a yard", "start_image": "yard"},
        3: {"prompt": "a hall"},
    }
    fidelities = {1: Fidelity(), 2: Fidelity(window=2), 3: Fidelity(steps=1)}
    alone = {seed: engine.open(seed=seed, **spec) for seed, spec in specs.items()}
    batch = {seed: engine.open(seed=seed, **spec) for seed, spec in specs.items()}
    for engaged in (alone, batch):
        advance(engine, engaged[1], FORWARD)  # one is a chunk older
    for number in range(5):
        turns = [Turn(batch[seed], PATHS[seed][number], fidelities[seed]) for seed in specs]
        results = engine.advance(turns)
        for seed, result in zip(specs, results, strict=True):
            (expected,) = engine.advance([Turn(alone[seed], PATHS[seed][number], fidelities[seed])])
            assert isinstance(result, Chunk) and isinstance(expected, Chunk)
            assert result.index == expected.index
            assert close(result.frames, expected.frames), f"session {seed}, chunk {number}"
        if number % 2:
            engine.settle([*batch.values()])


def test_a_batch_of_the_same_sessions_gives_the_same_frames_bit_for_bit(engine: StreamingEngine) -> None:
    def run() -> list[Frames]:
        sessions = [engine.open(seed=seed, prompt="a hall", start_image="hall") for seed in PATHS]
        frames = []
        for number in range(4):
            turns = [Turn(session, path[number]) for session, path in zip(sessions, PATHS.values(), strict=True)]
            frames += [chunk.frames for chunk in engine.advance(turns) if isinstance(chunk, Chunk)]
        for session in sessions:
            engine.close(session)
        return frames

    first = run()
    assert len(first) == 12
    assert same(first, run())


def test_one_poisoned_session_in_a_batch_of_four_disturbs_no_other(tiny_world: Path) -> None:
    """Its pose overflows, its latents turn to NaN, its steps or window are none of the model's, or it is closed."""
    engine = StreamingEngine(load_world(tiny_world, torch.float32), slots=8)

    def start() -> list[Session]:
        return [engine.open(seed=seed, prompt="a hall", start_image="hall") for seed in range(4)]

    sound, poisoned = start(), start()
    huge = CameraVelocity(forward=1e308)
    for number, (turn, complaint) in enumerate(
        [
            (Turn(poisoned[1], huge), r"chunk 0: .* takes the camera to a pose that is not finite"),
            (Turn(poisoned[1], FORWARD, Fidelity(steps=3)), r"steps=3: expected one of \[1, 2, 4\]"),
            (Turn(poisoned[1], FORWARD, Fidelity(window=9)), r"window=9: expected from 2 to 4 latent frames"),
            (Turn(poisoned[1], FORWARD, chunk=3), "control for chunk 3: it is not next, expected one for chunk 0"),
            (Turn(poisoned[2], FORWARD), "the session is in this batch already"),
        ]
    ):
        others = [Turn(poisoned[i], FORWARD) for i in (0, 2, 3)]
        results = engine.advance([others[0], others[1], turn, others[2]])
        expected = engine.advance([Turn(sound[i], FORWARD) for i in (0, 2, 3)])
        error = results.pop(2)
        assert isinstance(error, SessionError)
        assert re.search(complaint, str(error))
        for one, other in zip(results, expected, strict=True):
            assert isinstance(one, Chunk) and isinstance(other, Chunk)
            assert close(one.frames, other.frames), f"poison {number}"
    spoilt, whole = poisoned[1], sound[1]
    assert spoilt.chunks == 0, "a turn that was refused leaves the session as it was"
    assert close(advance(engine, spoilt, FORWARD).frames, advance(engine, whole, FORWARD).frames)

    engine.settle([spoilt])
    state = spoilt.rollout.cache.state()
    spoilt.rollout.cache.load_state({**state, "store": torch.full_like(state["store"], float("nan"))})
    results = engine.advance([Turn(session, RIGHT) for session in poisoned])
    expected = engine.advance([Turn(session, RIGHT) for session in (sound[0], sound[2], sound[3])])
    error = results.pop(1)
    assert isinstance(error, SessionError)
    assert "output is not finite" in str(error)
    for one, other in zip(results, expected, strict=True):
        assert isinstance(one, Chunk) and isinstance(other, Chunk)
        assert close(one.frames, other.frames)


def test_a_control_for_a_chunk_that_has_begun_comes_too_late(engine: StreamingEngine) -> None:
    session = engine.open(seed=1)
    assert isinstance(engine.advance([Turn(session, FORWARD, chunk=0)])[0], Chunk)
    (late,) = engine.advance([Turn(session, RIGHT, chunk=0)])
    assert str(late) == "control for chunk 0: it has begun already, expected one for chunk 1"
    (next_one,) = engine.advance([Turn(session, RIGHT, chunk=1)])
    assert isinstance(next_one, Chunk) and next_one.index == 1


def test_a_context_written_with_the_next_chunk_s_first_step_gives_the_same_frames(tiny_world: Path) -> None:
    world = load_world(tiny_world, torch.float32)
    apart, fused = StreamingEngine(world, 3), StreamingEngine(world, 3, fuse_context=True)
    runs = []
    for engine in (apart, fused):
        sessions = [engine.open(seed=seed, prompt=f"hall {seed}", start_image="hall") for seed in PATHS]
        chunks = []
        for number in range(5):
            turns = [Turn(session, path[number]) for session, path in zip(sessions, PATHS.values(), strict=True)]
            chunks += [chunk.frames for chunk in engine.advance(turns) if isinstance(chunk, Chunk)]
        runs.append(chunks)
    assert len(runs[0]) == 15
    assert all(close(a, b) for a, b in zip(*runs, strict=True))


def test_steps_and_window_may_change_at_every_chunk(engine: StreamingEngine) -> None:
    session, plain = (engine.open(seed=1, start_image="hall") for _ in range(2))
    low = {"steps": 1, "window": 2}
    first = advance(engine, session, FORWARD, **low).frames
    assert not np.array_equal(first, advance(engine, plain, FORWARD).frames)
    assert not np.array_equal(
        advance(engine, session, FORWARD).frames, advance(engine, session, FORWARD, euler=True).frames
    )


def test_sessions_with_one_prompt_share_its_keys_and_values(engine: StreamingEngine) -> None:
    one, other, third = (engine.open(seed=seed, prompt=text) for seed, text in enumerate(("a", "a", "b")))
    assert one.prompt is other.prompt
    assert one.prompt is not third.prompt
    engine.close(one)
    assert engine.open(seed=4, prompt="a").prompt is other.prompt


def test_a_prompt_that_is_too_long_is_refused_and_takes_no_slot(engine: StreamingEngine) -> None:
    with pytest.raises(SessionError, match=r"has 90 bytes, expected at most 12"):
        engine.open(seed=1, prompt="a" * 90)
    session = engine.open(seed=1, prompt="a")
    with pytest.raises(SessionError, match=r"has 90 bytes, expected at most 12"):
        engine.change_prompt(session, "a" * 90)
    assert session.caption == "a"
    assert engine.free_slots == 2


def test_a_new_prompt_goes_on_as_if_the_kept_past_had_always_had_it(tiny_world: Path) -> None:
    """Before the window is full that is the whole past: the session becomes one that began with the new prompt."""
    world = load_world(tiny_world, torch.float32)
    engine = StreamingEngine(world, 3)
    changed, always = (engine.open(seed=1, prompt=text, start_image="hall") for text in ("a hall", "a yard"))
    other = engine.open(seed=1, prompt="a hall", start_image="hall")
    for session in (changed, other):
        advance(engine, session, FORWARD)
    advance(engine, always, FORWARD)
    # the same past under the new prompt: its latents are the old prompt's, so they are lent to the other
    always.pending = changed.pending
    always.decoder_state = changed.decoder_state
    engine.change_prompt(changed, "a yard")
    after = [advance(engine, session, RIGHT).frames for session in (changed, always, other)]
    assert close(after[0], after[1])
    assert not same([after[0]], [after[2]])
    for _ in range(6):  # and on, past the window
        advance(engine, changed, FORWARD)
    engine.change_prompt(changed, "a hall")
    assert advance(engine, changed, RIGHT).index == 8


def test_the_origin_follows_a_far_camera_and_the_frames_do_not_notice(
    tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_world(tiny_world, torch.float32)
    fast = CameraVelocity(forward=30.0, yaw=20.0)
    moving = StreamingEngine(world, 1)
    session = moving.open(seed=1, start_image="hall")
    frames = [advance(moving, session, fast).frames for _ in range(12)]
    assert np.linalg.norm(session.origin[:3, 3]) > 20
    assert np.linalg.norm(session.local[:3, 3]) < np.linalg.norm(session.pose[:3, 3])

    monkeypatch.setattr("minwm.streaming.session.ANCHOR_REACH", float("inf"))
    fixed = StreamingEngine(world, 1)
    still = fixed.open(seed=1, start_image="hall")
    assert all(close(advance(fixed, still, fast).frames, one) for one in frames)
    np.testing.assert_allclose(session.pose, still.pose, atol=1e-9)
    np.testing.assert_array_equal(still.origin, np.eye(4))


def test_the_declared_bytes_are_those_that_a_session_holds(engine: StreamingEngine) -> None:
    session = engine.open(seed=1, start_image="hall")
    for _ in range(4):
        advance(engine, session, FORWARD)
    engine.settle([session])
    held = sum(part.nbytes for part in session.rollout.cache.state().values())
    held += sum(part.nbytes for part in session.decoder_state or ())
    held += sum(chunk.latents.nbytes for chunk in [*session.kept, *session.begun])
    assert held <= engine.bytes_per_session <= 1.2 * held


def test_an_eight_bit_cache_halves_a_session_and_shows_nearly_the_same(tiny_world: Path) -> None:
    world = load_world(tiny_world, torch.float32)
    whole, eight = StreamingEngine(world, 1), StreamingEngine(world, 1, eight_bit_cache=True)
    exact, rounded = (np.stack(fresh(engine, [FORWARD, RIGHT] * 3)).astype(int) for engine in (whole, eight))
    assert eight.bytes_per_session < whole.bytes_per_session
    assert 0 < np.abs(exact - rounded).mean() < 1


def test_products_of_eight_bits_show_nearly_the_same(tiny_world: Path) -> None:
    world = load_world(tiny_world, torch.float32)
    engines = StreamingEngine(world, 1), StreamingEngine(world, 1, eight_bit_products=True)
    exact, rounded = (np.stack(fresh(engine, [FORWARD, RIGHT] * 3)).astype(int) for engine in engines)
    assert 0 < np.abs(exact - rounded).mean() < 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_sessions_see_what_plain_ones_do_and_go_on_bit_for_bit_where_they_are_restored(
    tiny_world: Path,
) -> None:
    """Alone and together, past the first full window, at two fidelities; the cache's window is two chunks."""
    world = load_world(tiny_world, torch.float32)
    frames: list[list[Frames]] = []
    for compiled in (False, True):
        engine = StreamingEngine(world, slots=3, compiled=compiled)
        sessions = [engine.open(seed=seed, start_image="hall") for seed in (1, 2)]
        shown = [advance(engine, sessions[0], control).frames for control in PATHS[1]]
        for control, window in zip(PATHS[2], (None, None, None, 2, 2), strict=True):
            made = engine.advance([Turn(session, control, Fidelity(window=window)) for session in sessions])
            shown += [chunk.frames for chunk in made if isinstance(chunk, Chunk)]
        frames.append(shown)
    assert len(frames[0]) == len(frames[1]) == 15
    assert all(close(one, other) for one, other in zip(*frames, strict=True))
    again = snapshot.restore(engine, snapshot.take(engine, sessions[0]))
    assert same(play(engine, again, PATHS[3]), play(engine, sessions[0], PATHS[3]))
