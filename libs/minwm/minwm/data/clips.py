"""Clips: what training and evaluation read. Latents, cameras, actions, a caption, and the true frames.

A clip is a piece of an episode that was encoded as one stream, so its first latent frame has a past,
as a window in the middle of a session has.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minwm.data.shards import Manifest, read_manifest, read_samples
from minwm.data.video import decode_video, encode_video
from minwm.errors import DataError

KIND = "clips"
Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of `f` latent frames.

    latents:    (f, c, y, x) float16, normalised
    poses:      (f, 4, 4) float64, camera to world, of the last RGB frame of each latent frame
    intrinsics: (4,) float32
    actions:    (f,) int64, the motion from the previous latent frame's pose (81 classes)
    frames:     H.264 file of the 4·f RGB frames; decoded by `video`
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
        """The true RGB frames (4·f, y, x, 3)."""
        return decode_video(self.frames, where=f"clip {self.name}", expect=4 * len(self.latents))

    def to_files(self) -> dict[str, bytes]:
        """The files of this clip's shard sample."""
        about = {"episode": self.episode, "split": self.split, "caption": self.caption, "notes": self.notes}
        arrays: dict[str, NDArray[Any]] = {
            "latents": self.latents,
            "poses": self.poses,
            "intrinsics": self.intrinsics,
            "actions": self.actions,
        }
        files = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
        return {**files, "mp4": self.frames, "json": json.dumps(about).encode()}

    @classmethod
    def from_files(cls, name: str, files: dict[str, bytes]) -> "Clip":
        """The inverse of `to_files`. Raises DataError naming a missing or damaged file."""
        try:
            about = json.loads(files["json"])
            arrays = {
                part: np.load(io.BytesIO(files[f"{part}.npy"]), allow_pickle=False)
                for part in ("latents", "poses", "intrinsics", "actions")
            }
            return cls(name=name, frames=files["mp4"], **arrays, **about)
        except KeyError as error:
            raise DataError(f"clip {name}: lacks the file {error.args[0]}, has {sorted(files)}") from error
        except (ValueError, TypeError, EOFError) as error:
            raise DataError(f"clip {name}: cannot be read ({error})") from error


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
