"""Clips: what training and evaluation read. Latents, cameras, actions, a caption, and the true frames.

A clip is a piece of an episode that was encoded as one stream, so its first latent frame has a past,
as a window in the middle of a session has.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minwm.data.arrays import read_array
from minwm.data.shards import Manifest, ShardReader, read_manifest, read_samples
from minwm.data.video import decode_video, encode_video
from minwm.errors import DataError

KIND = "clips"
_ARRAYS = ("latents", "poses", "intrinsics", "actions")
_VIDEO = "mp4"
Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of `f` latent frames.

    latents:    (f, c, y, x) float16, normalised
    poses:      (f, 4, 4) float64, camera to world, of the last RGB frame of each latent frame
    intrinsics: (4,) float32
    actions:    (f,) int64, the motion from the previous latent frame's pose (81 classes)
    frames:     H.264 file of the 4·f RGB frames, decoded by `video`; empty where it was not read
    notes:      what annotated the clip, and how sure it was
    """

    name: str
    episode: str
    split: Split
    caption: str
    latents: NDArray[np.float16]
    poses: NDArray[np.float64]
    intrinsics: NDArray[np.float32]
    actions: NDArray[np.int64]
    frames: bytes
    notes: dict[str, Any]

    def __post_init__(self) -> None:
        count = len(self.latents)
        if count == 0:
            raise DataError(f"clip {self.name}: is empty")
        if len(self.poses) != count or len(self.actions) != count:
            raise DataError(
                f"clip {self.name}: {len(self.poses)} poses and {len(self.actions)} actions for {count} latent frames"
            )
        if not np.isfinite(self.poses).all():
            raise DataError(f"clip {self.name}: a pose is not finite")

    def video(self) -> NDArray[np.uint8]:
        """The true RGB frames (4·f, y, x, 3). Raises DataError where the clip was read without them."""
        if not self.frames:
            raise DataError(f"clip {self.name}: was read without its video")
        return decode_video(self.frames, where=f"clip {self.name}", expect=4 * len(self.latents))

    def to_files(self) -> dict[str, bytes]:
        """The files of this clip's shard sample."""
        about = {"episode": self.episode, "split": self.split, "caption": self.caption, "notes": self.notes}
        files = {f"{name}.npy": _npy(getattr(self, name)) for name in _ARRAYS}
        return {**files, _VIDEO: self.frames, "json": json.dumps(about).encode()}

    @classmethod
    def from_files(cls, name: str, files: Mapping[str, bytes]) -> "Clip":
        """The inverse of `to_files`. Raises DataError naming a missing or damaged file."""
        try:
            about = json.loads(files["json"])
            arrays: dict[str, Any] = {part: read_array(files[f"{part}.npy"]) for part in _ARRAYS}
            return cls(name=name, frames=files[_VIDEO], **arrays, **about)
        except KeyError as error:
            raise DataError(f"clip {name}: lacks the file {error.args[0]}, has {sorted(files)}") from error
        except (ValueError, TypeError, EOFError) as error:
            raise DataError(f"clip {name}: cannot be read ({error})") from error


class ClipReader:
    """The clips of a split by number, each read from its shard when it is asked for; videos only where `video` is set.

    Several threads may ask at once. Raises DataError when the split has no clips, and names a damaged one's shard.
    """

    def __init__(self, shards: ShardReader, split: Split, *, video: bool = False) -> None:
        self._shards, self._without = shards, () if video else (_VIDEO,)
        self._numbers = [number for number in range(len(shards)) if _split(shards, number) == split]
        if not self._numbers:
            raise DataError(f"{shards.shard(0).parent}: has no clips in split {split!r}, {len(shards)} in all")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Clip:
        number = self._numbers[index]
        files = self._shards.read(number, self._without)
        try:
            return Clip.from_files(self._shards.key(number), {**dict.fromkeys(self._without, b""), **files})
        except DataError as error:
            raise DataError(f"{self._shards.shard(number)}: {error}") from error


def _split(shards: ShardReader, number: int) -> str:
    try:
        return str(json.loads(shards.read(number, (_VIDEO, *(f"{name}.npy" for name in _ARRAYS)))["json"])["split"])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{shards.shard(number)}: clip {shards.key(number)}: names no split ({error!r})") from error


def load_clips(folder: Path, split: Split | None = None) -> tuple[list[Clip], Manifest]:
    """The clips of a dataset, of one split if given. Raises DataError when there are none."""
    manifest = read_manifest(folder, KIND)
    clips = [Clip.from_files(name, files) for name, files in read_samples(folder, KIND)]
    chosen = [clip for clip in clips if split is None or clip.split == split]
    if not chosen:
        raise DataError(f"{folder}: has no clips in split {split!r}, {len(clips)} in all")
    return chosen, manifest


def frames_to_mp4(frames: NDArray[np.uint8], fps: float) -> bytes:
    """RGB frames as the video file that a clip carries."""
    return encode_video(frames, fps, crf=14)


def clip_statistics(clips: Sequence[Clip]) -> dict[str, Any]:
    """Counts for the manifest."""
    actions = np.concatenate([clip.actions for clip in clips])
    labels, counts = np.unique(actions, return_counts=True)
    return {
        "clips": {split: sum(clip.split == split for clip in clips) for split in ("train", "heldout")},
        "latent_frames": int(sum(len(clip.latents) for clip in clips)),
        "actions": {str(label): int(count) for label, count in zip(labels, counts, strict=True)},
    }


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
