"""The game as a source: real play, whose poses must agree with the commands and with the picture's geometry."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import vizdoom
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.data import doom
from minwm.data.doom import FPS, MAP_UNITS_PER_WORLD_UNIT, RENDER_SIZE, DoomConfig, record
from minwm.data.episode import Episode
from minwm.errors import ConfigError
from minwm.geometry.camera import require_rigid

pytestmark = pytest.mark.unit

CONFIG = DoomConfig(scenes=("freedoom1:E1M2", "freedoom1:E2M1"), episodes=2, frames_per_episode=60, seed=5)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Episode]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("vizdoom"))  # the game leaves files where it is started
        yield list(record(CONFIG))


def motions(episode: Episode) -> NDArray[np.float64]:
    """(t − 1, 4, 4): each camera as seen from the one before it."""
    return np.linalg.inv(episode.poses[:-1]) @ episode.poses[1:]


def test_play_is_a_function_of_the_seed(
    episodes: list[Episode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again, other = (
        next(record(dataclasses.replace(CONFIG, frames_per_episode=20, seed=seed))) for seed in (CONFIG.seed, 6)
    )
    np.testing.assert_array_equal(again.frames, episodes[0].frames[:20])
    np.testing.assert_array_equal(again.poses, episodes[0].poses[:20])
    np.testing.assert_array_equal(again.commands, episodes[0].commands[:20])
    assert again.labels == episodes[0].labels[:20]
    assert not np.array_equal(other.frames, again.frames)


def test_episodes_are_dealt_to_the_scenes_and_hold_what_they_should(episodes: list[Episode]) -> None:
    assert [episode.scene for episode in episodes] == ["freedoom1:E1M2", "freedoom1:E2M1"]
    assert len({episode.name for episode in episodes}) == 2
    for episode in episodes:
        assert episode.frames.shape == (60, 96, 128, 3)
        assert episode.frames.dtype == np.uint8
        assert episode.frames.std() > 5, "there is something to see"
        assert episode.fps == FPS == 17.5
        assert not any("DoomPlayer" in names for names in episode.labels)


def test_poses_are_rigid_and_level(episodes: list[Episode]) -> None:
    for episode in episodes:
        require_rigid(episode.poses)
        np.testing.assert_allclose(episode.poses[:, :3, 1], np.tile([0, 0, -1.0], (60, 1)), atol=1e-9)


def test_turning_right_increases_the_yaw_to_the_right(episodes: list[Episode]) -> None:
    turned = 0
    for episode in episodes:
        motion, commanded = motions(episode), episode.commands[1:, 2]
        yaw = np.degrees(np.arctan2(motion[:, 0, 2], motion[:, 2, 2]))  # of forward, towards right
        np.testing.assert_allclose(yaw, commanded / FPS, atol=0.05)  # the game's angles have 16 bits
        turned += int((commanded != 0).sum())
    assert turned > 10


def test_the_camera_moves_where_it_was_commanded(episodes: list[Episode]) -> None:
    checked = 0
    for episode in episodes:
        velocity, commands = motions(episode)[:, [2, 0], 3] * FPS, episode.commands[1:, :2]  # forward, right
        for command in np.unique(commands[commands.any(axis=1)], axis=0):
            held = (commands == command).all(axis=1)
            held[3:] &= held[2:-1] & held[1:-2] & held[:-3]  # for a while: speed follows slowly
            typical = np.median(velocity[held], axis=0)
            if held.sum() < 8 or np.linalg.norm(typical) < np.linalg.norm(command) / 3:
                continue  # against a wall
            assert typical @ command > 0.9 * np.linalg.norm(typical) * np.linalg.norm(command)
            assert np.linalg.norm(typical) == pytest.approx(np.linalg.norm(command), rel=0.4)
            checked += 1
    assert checked


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[vizdoom.DoomGame]:
    """A rectangular room whose walls, floor and ceiling the game tells, rendered as the source renders."""
    monkeypatch.chdir(tmp_path)
    package = Path(vizdoom.__file__).parent
    game, variable = vizdoom.DoomGame(), vizdoom.GameVariable
    game.set_doom_game_path(str(package / "freedoom2.wad"))
    game.set_doom_scenario_path(str(package / "scenarios/basic.wad"))
    game.set_doom_map("map01")
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_window_visible(False)
    game.set_depth_buffer_enabled(True)
    game.set_sectors_info_enabled(True)
    game.set_render_hud(False)
    game.set_available_buttons([vizdoom.Button.MOVE_FORWARD_BACKWARD_DELTA, vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_available_game_variables(
        [variable.CAMERA_POSITION_X, variable.CAMERA_POSITION_Y, variable.CAMERA_POSITION_Z, variable.CAMERA_ANGLE]
    )
    game.add_game_args("-nomonsters +movebob 0")
    game.init()
    game.make_action([0, 0], 20)
    yield game
    game.close()


def test_poses_and_intrinsics_put_walls_where_the_picture_shows_them(room: vizdoom.DoomGame) -> None:
    """Upper and lower edges of the room's walls, projected, against the steps in the depth buffer's columns."""
    height, width = RENDER_SIZE
    fx, fy, cx, cy = doom.intrinsics(height, width).tolist()
    checked = 0
    for forward, turn in ((0, 0), (-10, 1.5), (0, -3), (8, 2), (0, 12), (5, 7)):
        room.make_action([forward, turn], 4)
        viewmat = np.linalg.inv(doom._camera_pose(room))
        state = room.get_state()
        assert state is not None and state.depth_buffer is not None and state.sectors is not None
        (sector,) = state.sectors
        for line in sector.lines:
            for share in np.linspace(0.05, 0.95, 19):
                x, y = line.x1 + share * (line.x2 - line.x1), line.y1 + share * (line.y2 - line.y1)
                top, foot = (
                    (viewmat @ [*np.array([x, y, z]) / MAP_UNITS_PER_WORLD_UNIT, 1.0])[:3]
                    for z in (sector.ceiling_height, sector.floor_height)
                )
                if top[2] < 9:  # nearer, the depth buffer's steps are wider than a row
                    continue
                column = width * (fx * top[0] / top[2] + cx)
                if not 2 < column < width - 2:
                    continue
                depths = state.depth_buffer[:, int(column)].astype(int)
                wall = np.flatnonzero(np.abs(depths - depths[height // 2]) <= 1)
                assert wall[0] == pytest.approx(height * (fy * top[1] / top[2] + cy), abs=1.5)
                assert wall[-1] + 1 == pytest.approx(height * (fy * foot[1] / foot[2] + cy), abs=1.5)
                checked += 1
    assert checked > 40


@given(source=st.integers(1, 60), target=st.integers(1, 60))
def test_shrinking_weighs_every_source_pixel_by_the_area_it_covers(source: int, target: int) -> None:
    """Against the long way: repeat every pixel `target` times, then average runs of `source`."""
    weights = doom._area_weights(source, target)
    values = np.random.default_rng(source).standard_normal(source)
    expected = values.repeat(target).reshape(target, source).mean(axis=1)
    np.testing.assert_allclose(weights @ values, expected, atol=1e-5)


def test_a_flat_picture_stays_as_it_is_when_shrunk() -> None:
    rows, columns = doom._area_weights(240, 96), doom._area_weights(320, 128)
    for level in (0, 1, 127, 255):
        small = doom._shrink(np.full((240, 320, 3), level, np.uint8), rows, columns)
        np.testing.assert_array_equal(small, np.full((96, 128, 3), level))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"scenes": ("freedoom9:E1M1",)}, "scenes: no such scene 'freedoom9:E1M1', expected wad:map"),
        ({"scenes": ("freedoom1:E9M9",)}, "scenes: no such scene 'freedoom1:E9M9', expected wad:map"),
        ({"scenes": ("freedoom1",)}, "scenes: no such scene 'freedoom1', expected wad:map"),
        ({"episodes": 0}, "episodes=0"),
        ({"frames_per_episode": 0}, "frames_per_episode=0"),
    ],
)
def test_impossible_play_is_refused(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        DoomConfig(**wrong)  # type: ignore[arg-type]
