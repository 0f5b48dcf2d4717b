"""What the many-step teacher reached on held-out clips, kept so that its students can be measured without it.

A teacher takes minutes a clip, and its weights are not shipped beside its student's. Its measures are small, and hold
for the clips, size, length and critics they were taken with: `about` names these, so that nothing else is compared.
"""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minwm.errors import DataError
from minwm.evaluation.measures import Measures


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """`steps` and `guidance` of its sampler, its measures by the name of the clip, and what they hold for."""

    steps: int
    about: dict[str, Any]
    measures: dict[str, Measures]
    guidance: float = 1.0


def save_teacher(path: Path, record: TeacherRecord) -> None:
    """Write the record to an `.npz` file; what was not measured is left out."""
    arrays = {
        f"{clip}/{name}": value.astype(np.float32)
        for clip, measured in record.measures.items()
        for name, value in asdict(measured).items()
        if value is not None
    }
    sampler = np.array(record.steps), np.array(record.guidance)
    about = np.array(json.dumps(record.about))
    np.savez_compressed(path, steps=sampler[0], guidance=sampler[1], about=about, **arrays)


def load_teacher(path: Path) -> TeacherRecord:
    """Read a record. Raises DataError for a file that is none."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            content = {key: archive[key] for key in archive.files}
        steps, about = int(content.pop("steps")), json.loads(str(content.pop("about")))
        guidance = float(content.pop("guidance", 1.0))  # older records have none, and were made without
        clips: dict[str, dict[str, np.ndarray]] = {}
        for key, value in content.items():
            clip, _, name = key.rpartition("/")
            clips.setdefault(clip, {})[name] = value.astype(np.float64)
        measures = {clip: Measures(**values) for clip, values in clips.items()}
        return TeacherRecord(steps=steps, about=about, measures=measures, guidance=guidance)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a teacher's record ({error})") from error
