"""A source of episodes: somebody walks through Doom maps, and every frame's camera is known exactly.

Plays VizDoom headless on the Freedoom maps that it bundles. Records one RGB frame every two tics
(17.5 frames/s) with the camera's pose and the commanded velocity. The view stays level; HUD, weapon,
crosshair and particles are hidden. World unit: 32 map units. Cuts, filters and encodes nothing.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minwm.data.episode import Episode
from minwm.errors import ConfigError, DataError
from minwm.geometry.camera import intrinsics_for_fov

try:
    import vizdoom
except ModuleNotFoundError as error:
    raise ConfigError("VizDoom is not installed here: pip install 'minwm[doom]'") from error

TICS_PER_SECOND = 35
TICS_PER_FRAME = 2
FPS = TICS_PER_SECOND / TICS_PER_FRAME
MAP_UNITS_PER_WORLD_UNIT = 32.0
RENDER_SIZE = (240, 320)
PIXEL_HEIGHT = 1.2
START_TICS = 14  # the game ignores its player for the first tics of a map

_HIDDEN = ("hud", "weapon", "crosshair", "decals", "particles", "effects_sprites", "messages", "screen_flashes")
# A move command of v makes a walking player settle at about v/3 map units a tic (measured).
_MAP_UNITS_PER_TIC_AND_COMMAND = 1 / 3


@dataclass(frozen=True, kw_only=True)
class DoomConfig:
    """What to play. `scenes` are `wad:map`; `episodes` are dealt to the scenes in turn."""

    scenes: tuple[str, ...] = ("freedoom1:E1M2", "freedoom1:E1M3", "freedoom1:E2M1")
    episodes: int = 3
    frames_per_episode: int = 1024
    height: int = 96
    width: int = 128
    walk_command: int = 13
    turn_degrees_per_tic: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for scene in self.scenes:
            path, _, level = (_wad_path(scene), *scene.partition(":")[1:])
            if not path.is_file() or level not in _lumps(path):
                raise ConfigError(f"scenes: no such scene {scene!r}, expected wad:map such as freedoom1:E1M3")
        if self.episodes < 1 or self.frames_per_episode < 1:
            raise ConfigError(
                f"episodes={self.episodes}, frames_per_episode={self.frames_per_episode}: expected at least 1"
            )


def intrinsics(height: int, width: int) -> NDArray[np.float32]:
    """fx fy cx cy normalised by image size, for Doom's 90° horizontal field of view.

    Doom draws its pixels 1.2 times as high as wide, and the engine keeps that at any size (measured on walls).
    """
    return intrinsics_for_fov(90.0, height, width, pixel_height=PIXEL_HEIGHT)


def record(config: DoomConfig) -> Iterator[Episode]:
    """Play `config.episodes` episodes, one at a time."""
    for index in range(config.episodes):
        yield _record_one(config, index)


def _record_one(config: DoomConfig, index: int) -> Episode:
    scene = config.scenes[index % len(config.scenes)]
    seed = config.seed * 100_003 + index
    player = _Wanderer(config, np.random.default_rng(seed))
    shrink = (_area_weights(RENDER_SIZE[0], config.height), _area_weights(RENDER_SIZE[1], config.width))
    frames, poses, commands, labels = [], [], [], []
    game = _open_game(scene, seed)
    try:
        game.make_action([0, 0, 0, 0], START_TICS)
        for _ in range(config.frames_per_episode):
            command = player.next_command(_speed(game), _room(game))
            forward, right, turn = command
            game.make_action([forward, right, turn, int(player.pushing)], TICS_PER_FRAME)
            state = game.get_state()
            if state is None or state.screen_buffer is None:
                raise DataError(f"{scene}: the game ended after {len(frames)} frames")
            frames.append(_shrink(state.screen_buffer, *shrink))
            poses.append(_camera_pose(game))
            commands.append(_velocity(command))
            labels.append(sorted({label.object_name for label in state.labels or ()} - {"DoomPlayer"}))
    finally:
        game.close()
    return Episode(
        name=f"{scene.replace(':', '-').lower()}-{seed:06d}",
        frames=np.stack(frames),
        poses=np.stack(poses),
        intrinsics=intrinsics(config.height, config.width),
        commands=np.array(commands, np.float32),
        labels=labels,
        scene=scene,
        fps=FPS,
    )


def _wad_path(scene: str) -> Path:
    return Path(vizdoom.__file__).parent / f"{scene.partition(':')[0]}.wad"


def _lumps(path: Path) -> set[str]:
    """The names in a WAD file's directory. (The game plays another map, silently, when it lacks the one asked for.)"""
    content = path.read_bytes()
    count, offset = struct.unpack_from("<ii", content, 4)
    entries = struct.iter_unpack("<ii8s", content[offset : offset + 16 * count])
    return {name.rstrip(b"\0").decode("ascii", "replace") for _, _, name in entries}


def _open_game(scene: str, seed: int) -> vizdoom.DoomGame:
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(_wad_path(scene)))
    game.set_doom_map(scene.partition(":")[2])
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_window_visible(False)
    game.set_labels_buffer_enabled(True)
    game.set_depth_buffer_enabled(True)
    for part in _HIDDEN:
        getattr(game, f"set_render_{part}")(False)
    button, variable = vizdoom.Button, vizdoom.GameVariable
    game.set_available_buttons(
        [
            button.MOVE_FORWARD_BACKWARD_DELTA,
            button.MOVE_LEFT_RIGHT_DELTA,
            button.TURN_LEFT_RIGHT_DELTA,
            button.USE,
        ]
    )
    game.set_available_game_variables(
        [
            variable.CAMERA_POSITION_X,
            variable.CAMERA_POSITION_Y,
            variable.CAMERA_POSITION_Z,
            variable.CAMERA_ANGLE,
            variable.VELOCITY_X,
            variable.VELOCITY_Y,
        ]
    )
    game.add_game_args("-nomonsters +movebob 0")
    game.set_episode_timeout(0)
    game.set_seed(seed)
    game.init()
    return game


def _camera_pose(game: vizdoom.DoomGame) -> NDArray[np.float64]:
    """Camera to world (4, 4). Doom's angle is counter-clockwise from east, its z points up."""
    x, y, z, angle = (
        game.get_game_variable(variable)
        for variable in (
            vizdoom.GameVariable.CAMERA_POSITION_X,
            vizdoom.GameVariable.CAMERA_POSITION_Y,
            vizdoom.GameVariable.CAMERA_POSITION_Z,
            vizdoom.GameVariable.CAMERA_ANGLE,
        )
    )
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    pose = np.eye(4)
    pose[:3, 0] = (sin, -cos, 0.0)
    pose[:3, 1] = (0.0, 0.0, -1.0)
    pose[:3, 2] = (cos, sin, 0.0)
    pose[:3, 3] = np.array([x, y, z]) / MAP_UNITS_PER_WORLD_UNIT
    return pose


def _speed(game: vizdoom.DoomGame) -> float:
    """Map units a tic over the ground."""
    return math.hypot(
        game.get_game_variable(vizdoom.GameVariable.VELOCITY_X),
        game.get_game_variable(vizdoom.GameVariable.VELOCITY_Y),
    )


def _room(game: vizdoom.DoomGame) -> tuple[float, float, float]:
    """How far the view is open to the left, ahead and to the right, in steps of the depth buffer (0..255)."""
    state = game.get_state()
    if state is None or state.depth_buffer is None:
        return 255.0, 255.0, 255.0
    band = state.depth_buffer[110:130]
    return float(band[:, :80].mean()), float(band[:, 130:190].min()), float(band[:, 240:].mean())


def _velocity(command: tuple[int, int, float]) -> tuple[float, float, float]:
    """Buttons to commanded velocity: world units/s forward and right, degrees/s to the right."""
    scale = _MAP_UNITS_PER_TIC_AND_COMMAND * TICS_PER_SECOND / MAP_UNITS_PER_WORLD_UNIT
    return command[0] * scale, command[1] * scale, command[2] * TICS_PER_SECOND


def _area_weights(source: int, target: int) -> NDArray[np.float32]:
    """(target, source) weights of exact area averaging along one axis."""
    edges = np.linspace(0, source, target + 1)
    low = np.maximum(edges[:-1, None], np.arange(source))
    high = np.minimum(edges[1:, None], np.arange(source) + 1)
    return np.asarray(np.maximum(high - low, 0) * target / source, np.float32)


def _shrink(frame: NDArray[np.uint8], rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.uint8]:
    channels_first = frame.transpose(2, 0, 1).astype(np.float32)
    small = rows @ channels_first @ columns.T
    return (small.transpose(1, 2, 0) + 0.5).astype(np.uint8)


class _Wanderer:
    """Holds a random compound control for a while; turns towards the open side before a wall, tries doors."""

    # (weight, forward, right, turn): the mix of motions a player makes
    _MOTIONS = (
        (34, 1, 0, 0),
        (13, 1, 0, 1),
        (13, 1, 0, -1),
        (8, 0, 0, 1),
        (8, 0, 0, -1),
        (5, 0, 1, 0),
        (5, 0, -1, 0),
        (2, 1, 1, 0),
        (2, 1, -1, 0),
        (5, -1, 0, 0),
        (5, 0, 0, 0),
    )
    _STUCK_FRAMES = 5
    _CLOSE = 5.0  # depth steps at which a wall is about to stop the player

    def __init__(self, config: DoomConfig, random: np.random.Generator) -> None:
        self._config = config
        self._random = random
        self._motion = (1, 0, 0)
        self._left = 0
        self._stuck = 0
        self.pushing = False

    def next_command(self, speed: float, room: tuple[float, float, float]) -> tuple[int, int, float]:
        """Button values for the next frame, given the speed (map units a tic) and the room in view."""
        left, ahead, right = room
        full = self._config.walk_command * _MAP_UNITS_PER_TIC_AND_COMMAND
        moving = self._motion[0] != 0 or self._motion[1] != 0
        self._stuck = self._stuck + 1 if moving and speed < 0.35 * full else 0
        self.pushing = self._stuck in (4, 5)
        walled = self._motion[0] == 1 and ahead < self._CLOSE and self._random.random() < 0.7
        if self._stuck > self._STUCK_FRAMES or walled:
            self._motion = (0, 0, 1 if right + self._random.normal(0, 5) > left else -1)
            self._left = int(self._random.integers(10, 40))
            self._stuck = 0
        elif self._left == 0:
            weights = np.array([motion[0] for motion in self._MOTIONS], float)
            chosen = self._MOTIONS[self._random.choice(len(self._MOTIONS), p=weights / weights.sum())]
            self._motion = (chosen[1], chosen[2], chosen[3])
            self._left = int(self._random.integers(8, 40))
        self._left -= 1
        forward, right_step, turn = self._motion
        walk = self._config.walk_command
        return forward * walk, right_step * walk, turn * self._config.turn_degrees_per_tic
