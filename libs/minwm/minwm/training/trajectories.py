"""ODE trajectories of the autoregressive teacher, as shards: what causal ODE distillation (stage 3a) regresses.

For windows of a dataset's clips, each chunk is sampled from noise by many Euler steps with guidance, given the true
chunks before it (Causal Forcing, arXiv 2602.02214); kept are the states at the levels at which the student will be
asked, and the end point. Noise is keyed by (seed, window): the same recipe writes the same shards.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.data.clips import Clip
from minwm.data.shards import Manifest, ShardWriter, read_manifest, read_samples
from minwm.diffusion import flow
from minwm.errors import ConfigError, DataError
from minwm.models.backbones import Backbone
from minwm.models.context import History
from minwm.models.presets import WorldConfig
from minwm.models.sampling import Guidance, TeacherRollout
from minwm.training.batch import Batch, WindowConfig, cut_windows, unprompted
from minwm.training.draw import Draw
from minwm.training.levels import made_for, require_steps

KIND = "trajectories"
_TOLERANCE = 1e-6  # of a level; neighbouring ones of 1000 steps are further apart
_ARRAYS = ("states", "clean", "viewmats", "motions", "intrinsics", "actions")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What to sample, and how.

    window:     how windows are cut; a caption that is dropped is dropped for the teacher, and for the student with it
    windows:    how many, taken from the clips in turn
    steps:      numbers of sampling steps of the student: the states kept are those at their levels
    ode_steps:  Euler steps of the teacher, a multiple of each of `steps`
    guidance:   of the teacher, bare + g·(prompted − bare); 1 is none
    batch_size: windows at once; does not change what is written, but for rounding
    """

    window: WindowConfig = WindowConfig()
    windows: int
    steps: tuple[int, ...] = (8, 4, 2, 1)
    ode_steps: int = 48
    guidance: float = 1.0
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        require_steps(self.steps)
        if min(self.windows, self.batch_size) < 1:
            raise ConfigError(f"windows={self.windows}, batch_size={self.batch_size}: expected at least 1 each")
        if any(self.ode_steps % count for count in self.steps) or self.ode_steps < 1:
            raise ConfigError(f"ode_steps={self.ode_steps}: expected a multiple of each of steps={list(self.steps)}")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What the teacher made of one window of `f` latent frames.

    states:     (s + 1, f, c, y, x) float16: at each of the set's `s` noise levels, from noise down, and the end point
    clean:      (f, c, y, x) float16, the true window
    viewmats:   (f, 4, 4) float32, relative to the window's first frame; motions (f, 4, 4): see `prope.Cameras`
    intrinsics: (4,) float32
    actions:    (f,) int64
    image:      whether the teacher saw the first image
    """

    name: str
    caption: str
    image: bool
    states: NDArray[np.float16]
    clean: NDArray[np.float16]
    viewmats: NDArray[np.float32]
    motions: NDArray[np.float32]
    intrinsics: NDArray[np.float32]
    actions: NDArray[np.int64]

    def to_files(self) -> dict[str, bytes]:
        """The files of this trajectory's shard sample."""
        files = {"json": json.dumps({"caption": self.caption, "image": self.image}).encode()}
        for name in _ARRAYS:
            buffer = io.BytesIO()
            np.save(buffer, getattr(self, name), allow_pickle=False)
            files[f"{name}.npy"] = buffer.getvalue()
        return files

    @classmethod
    def from_files(cls, name: str, files: dict[str, bytes]) -> "Trajectory":
        """The inverse of `to_files`. Raises DataError naming a missing or damaged file."""
        try:
            arrays = {part: np.load(io.BytesIO(files[f"{part}.npy"]), allow_pickle=False) for part in _ARRAYS}
            return cls(name=name, **arrays, **json.loads(files["json"]))
        except KeyError as error:
            raise DataError(f"trajectory {name}: lacks the file {error.args[0]}, has {sorted(files)}") from error
        except (ValueError, TypeError, EOFError) as error:
            raise DataError(f"trajectory {name}: cannot be read ({error})") from error


@dataclass(frozen=True)
class TrajectorySet:
    """Trajectories, and what their manifest says of them.

    history: with which they were made
    levels:  of a student, by its number of sampling steps
    states:  the noise levels of the states, from noise down
    """

    samples: Sequence[Trajectory]
    history: History
    levels: dict[int, tuple[float, ...]]
    states: tuple[float, ...]
    digest: str


def write_trajectories(
    teacher: Backbone,
    clips: Sequence[Clip],
    config: SamplingConfig,
    folder: Path,
    about: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Sample `config.windows` windows to `folder`; `progress` is told how many are done.

    Raises ConfigError where the teacher's own levels for a number of steps are not among those of `ode_steps`.
    """
    world = made_for(teacher.config, config.steps)
    grid = flow.schedule(config.ode_steps, world.shift)
    places = _places(grid, world)
    with ShardWriter(folder, KIND) as writer:
        writer.about = {
            **about,
            "sampling": json.loads(json.dumps(asdict(config))),
            "history": asdict(world.history),
            "levels": {str(count): list(levels) for count, levels in world.levels.items()},
            "states": [grid[place] for place in places],
        }
        for first in range(0, config.windows, config.batch_size):
            numbers = range(first, min(first + config.batch_size, config.windows))
            draw = Draw(config.seed, 0, numbers, next(teacher.model.parameters()).device)
            batch = cut_windows([clips[n % len(clips)] for n in numbers], draw, config.window, teacher.encode)
            states = sample_states(teacher, batch, draw, grid, places, config.guidance)
            for number, trajectory in zip(numbers, _trajectories(numbers, batch, states), strict=True):
                writer.add(trajectory.name, trajectory.to_files())
                if progress is not None:
                    progress(number + 1)
    return read_manifest(folder, KIND)


@torch.no_grad()
def sample_states(
    teacher: Backbone, batch: Batch, draw: Draw, grid: Sequence[float], places: Sequence[int], guidance: float
) -> Tensor:
    """States (b, s + 1, f, c, y, x) at some places of the grid of levels and at its end; chunks see true history."""
    model, history, clean = teacher.model, teacher.config.history, batch.latents
    history.require_chunks(clean.shape[1])
    bare = None if guidance == 1 else model.prompt(unprompted(batch, teacher.encode))
    rollout = TeacherRollout(
        model, history, clean.shape[2:], Guidance(model.prompt(batch.text), bare, guidance), batch=len(clean)
    )
    noise, chunks = draw.normal("trajectory", clean.shape[1:]), []
    for start in range(0, clean.shape[1], history.chunk):
        now = slice(start, start + history.chunk)
        conditions = batch.conditions.frames(now.start, now.stop)
        path = enumerate(rollout.path(noise[:, now], conditions, grid))
        chunks.append(torch.stack([state for place, state in path if place in (*places, len(grid))], dim=1))
        rollout.commit(clean[:, now], conditions)
    return torch.cat(chunks, dim=2)


def load_trajectories(folder: Path) -> TrajectorySet:
    """The trajectories in a folder. Raises DataError for anything else."""
    manifest = read_manifest(folder, KIND)
    try:
        levels = {int(count): tuple(values) for count, values in manifest.about["levels"].items()}
        history, states = History(**manifest.about["history"]), tuple(manifest.about["states"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: its manifest does not say how it was sampled ({error!r})") from error
    samples = [Trajectory.from_files(name, files) for name, files in read_samples(folder, KIND)]
    return TrajectorySet(samples, history, levels, states, manifest.digest())


def _places(grid: Sequence[float], world: WorldConfig) -> list[int]:
    """Where in the teacher's grid the levels lie at which the student samples, each once."""
    places = set[int]()
    for level in (level for levels in world.levels.values() for level in levels):
        nearest = min(range(len(grid)), key=lambda place: abs(grid[place] - level))
        if abs(grid[nearest] - level) > _TOLERANCE:
            raise ConfigError(f"steps: level {level} is not among those of {len(grid)} steps with shift {world.shift}")
        places.add(nearest)
    return sorted(places)


def _trajectories(numbers: Sequence[int], batch: Batch, states: Tensor) -> Iterator[Trajectory]:
    conditions, cameras = batch.conditions, batch.conditions.cameras
    if cameras is None or conditions.actions is None or conditions.image is None:
        raise DataError("windows of clips lack cameras, actions or a first image")
    for i, number in enumerate(numbers):
        yield Trajectory(
            name=f"window-{number:07d}",
            caption=batch.captions[i],
            image=bool(conditions.image[i].any()),
            states=states[i].half().cpu().numpy(),
            clean=batch.latents[i].half().cpu().numpy(),
            viewmats=cameras.viewmats[i].cpu().numpy(),
            motions=cameras.motions[i].cpu().numpy(),
            intrinsics=cameras.intrinsics[i].cpu().numpy(),
            actions=conditions.actions[i].cpu().numpy(),
        )
