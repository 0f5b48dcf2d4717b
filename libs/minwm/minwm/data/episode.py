"""An episode: what a source hands over, before anything is cut, filtered or encoded.

Frames are RGB at the dataset's size; poses are camera-to-world, OpenCV axes (x right, y down,
z forward), one per frame; commands are what the player asked for, which walls may have refused.
"""

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minwm.data.arrays import read_arrays
from minwm.data.shards import Manifest, ShardReader, ShardWriter, read_manifest, read_samples
from minwm.data.video import decode_video, encode_video
from minwm.errors import DataError

KIND = "episodes"
_TRACK = ("poses", "intrinsics", "commands", "labels", "scene", "fps")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One uninterrupted recording.

    frames:     (t, y, x, 3) uint8
    poses:      (t, 4, 4) float64, camera to world, world units
    intrinsics: (4,) float32, fx fy cx cy normalised by image size
    commands:   (t, 3) float32, commanded velocity: forward, right (world units/s), yaw right (degrees/s)
    labels:     per frame, the names the source gives to what is in view
    """

    name: str
    frames: NDArray[np.uint8]
    poses: NDArray[np.float64]
    intrinsics: NDArray[np.float32]
    commands: NDArray[np.float32]
    labels: list[list[str]]
    scene: str
    fps: float

    def __post_init__(self) -> None:
        count = len(self.frames)
        if count == 0:
            raise DataError(f"episode {self.name}: has no frames")
        for field in ("poses", "commands", "labels"):
            if len(getattr(self, field)) != count:
                raise DataError(f"episode {self.name}: {field} has {len(getattr(self, field))} rows for {count} frames")
        if not np.isfinite(self.poses).all():
            bad = int(np.flatnonzero(~np.isfinite(self.poses).all(axis=(1, 2)))[0])
            raise DataError(f"episode {self.name}: the pose of frame {bad} is not finite")

    def to_files(self) -> dict[str, bytes]:
        """The episode as the files of one shard sample; frames are compressed without loss."""
        track = io.BytesIO()
        np.savez_compressed(
            track,
            poses=self.poses,
            intrinsics=self.intrinsics,
            commands=self.commands,
            labels=np.array([",".join(names) for names in self.labels]),
            scene=np.array(self.scene),
            fps=np.array(self.fps),
        )
        return {"frames.mkv": encode_video(self.frames, self.fps, lossless=True), "track.npz": track.getvalue()}

    @classmethod
    def from_files(cls, name: str, files: dict[str, bytes]) -> "Episode":
        """The inverse of `to_files`. Raises DataError for missing, damaged and truncated files."""
        for needed in ("frames.mkv", "track.npz"):
            if needed not in files:
                raise DataError(f"episode {name}: lacks {needed}, has {sorted(files)}")
        try:
            arrays = read_arrays(files["track.npz"])
            track = {field: arrays[field] for field in _TRACK}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"episode {name}: track.npz cannot be read ({error})") from error
        return cls(
            name=name,
            frames=decode_video(files["frames.mkv"], where=f"episode {name}", expect=len(track["poses"])),
            poses=track["poses"],
            intrinsics=track["intrinsics"],
            commands=track["commands"],
            labels=[text.split(",") if text else [] for text in track["labels"].tolist()],
            scene=str(track["scene"]),
            fps=float(track["fps"]),
        )


def write_episodes(
    episodes: Iterable[Episode], folder: Path, about: Mapping[str, Any], progress: Callable[[int], None] | None = None
) -> Manifest:
    """Write recordings as a dataset; `progress` is told how many are written."""
    with ShardWriter(folder, KIND) as writer:
        writer.about = dict(about)
        for index, episode in enumerate(episodes):
            writer.add(episode.name, episode.to_files())
            if progress is not None:
                progress(index + 1)
    return read_manifest(folder, KIND)


def iterate_episodes(folder: Path) -> Iterator[Episode]:
    """The recordings of a dataset, one in memory at a time."""
    for name, files in read_samples(folder, KIND):
        yield Episode.from_files(name, files)


class EpisodeReader:
    """Recordings by number, each read and decoded when it is asked for; from any number of threads."""

    def __init__(self, shards: ShardReader) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> Episode:
        try:
            return Episode.from_files(self._shards.key(number), self._shards.read(number))
        except DataError as error:
            raise DataError(f"{self._shards.shard(number)}: {error}") from error
