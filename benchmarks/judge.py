"""How good the judge of generated video is, on real play that it has not seen.

    python benchmarks/judge.py --data runs/ship/episodes --heldout-every 6 --out build/judge.json
    python benchmarks/judge.py --data runs/ship/unseen --out build/judge-unseen.json

Cuts recorded episodes into clips and compares what the judge says with the recording: camera motions with the exact
poses, objects in view and maps with their names. `--through` shows it an autoencoder's reconstruction of the frames
instead, which is soft as generated video is.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from minwm.data.build import encode_stream
from minwm.data.episode import Episode, iterate_episodes
from minwm.evaluation.judge import (
    WINDOW,
    Judge,
    average_precision,
    load_judge,
    motion_error,
    true_motions,
)
from minwm.models.autoencoder import Autoencoder
from minwm.models.checkpoints import load_autoencoder
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.precision import native_dtype

CHUNK = 32  # latent frames decoded at a time


def main(
    data: Annotated[Path, typer.Option(help="Recorded episodes.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    judge: Annotated[Path, typer.Option(help="The judge's folder.")] = Path("models/doom-judge"),
    heldout_every: Annotated[int, typer.Option(help="Use each n-th episode only; 1: all.")] = 1,
    clip_frames: Annotated[int, typer.Option(help="RGB frames of a clip, a multiple of 4.")] = 128,
    through: Annotated[Path | None, typer.Option(help="Judge this autoencoder's reconstructions.")] = None,
) -> None:
    """Measure, print and write the figures."""
    model = load_judge(judge)
    autoencoder = load_autoencoder(through, native_dtype()) if through else None
    clips = [
        clip
        for index, episode in enumerate(iterate_episodes(data))
        if index % heldout_every == heldout_every - 1
        for clip in _clips(episode, clip_frames, autoencoder)
    ]
    figures = {"judge": str(judge), "data": str(data), "through": through and str(through), "clips": len(clips)}
    figures |= _motions(model, clips) | _recognition(model, clips)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1))
    Console().print_json(data=figures)


def _clips(episode: Episode, length: int, autoencoder: Autoencoder | None) -> Iterator[Episode]:
    frames = episode.frames if autoencoder is None else _reconstructed(autoencoder, episode.frames)
    for start in range(0, len(frames) - length + 1, length):
        piece = slice(start, start + length)
        yield dataclasses.replace(
            episode,
            frames=frames[piece],
            poses=episode.poses[piece],
            commands=episode.commands[piece],
            labels=episode.labels[piece],
        )


@torch.inference_mode()
def _reconstructed(autoencoder: Autoencoder, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    latents = torch.from_numpy(encode_stream(autoencoder, frames)).to(native_dtype())
    pieces, state = [], None
    for part in latents.split(CHUNK):
        decoded, state = autoencoder.decode(part[None], state)
        pieces.append((decoded[0].float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(pieces)


def _motions(judge: Judge, clips: list[Episode]) -> dict[str, Any]:
    estimated = np.concatenate([judge.motions(clip.frames) for clip in clips])
    last = slice(FRAMES_PER_LATENT - 1, None, FRAMES_PER_LATENT)
    true = np.concatenate([true_motions(clip.poses[last]) for clip in clips])
    error = np.abs(estimated - true).mean(axis=0)
    by_axis = dict(zip(("right", "forward", "down", "yaw"), error.tolist(), strict=True))
    return {**dataclasses.asdict(motion_error(estimated, true)), "mean_error": by_axis}


def _recognition(judge: Judge, clips: list[Episode]) -> dict[str, Any]:
    """Mean average precision over the labels that occur, beside that of guessing; the share of maps named rightly."""
    recognised = [judge.recognise(clip.frames) for clip in clips]
    scores = np.concatenate([labels for labels, _ in recognised])
    ends = slice(WINDOW - 1, None, FRAMES_PER_LATENT)
    names = [names for clip in clips for names in clip.labels[ends]]
    seen = np.array([[label in here for label in judge.config.labels] for here in names])
    occurring = np.flatnonzero(seen.any(axis=0))
    precision = {judge.config.labels[i]: average_precision(scores[:, i], seen[:, i]) for i in occurring}
    known = [(clip.scene, scenes) for clip, (_, scenes) in zip(clips, recognised, strict=True)]
    right = [
        judge.config.scenes[int(scenes.mean(0).argmax())] == scene
        for scene, scenes in known
        if scene in judge.config.scenes
    ]
    return {
        "label_map": _mean(list(precision.values())),
        "label_map_by_chance": _mean(seen[:, occurring].mean(axis=0).tolist()),
        "label_precision": precision,
        "label_accuracy": float(((scores > 0.5) == seen).mean()),
        "scene_accuracy": _mean(right),
        "windows": len(scores),
    }


def _mean(values: list[Any]) -> float | None:
    """None of nothing, which JSON has a word for."""
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    typer.run(main)
