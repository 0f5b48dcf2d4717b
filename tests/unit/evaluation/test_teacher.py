from pathlib import Path

import numpy as np
import pytest

from minwm.errors import DataError
from minwm.evaluation.measures import Measures
from minwm.evaluation.teacher import TeacherRecord, load_teacher, save_teacher

pytestmark = pytest.mark.unit


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    full = Measures(
        psnr=random.normal(size=6),
        ssim=random.normal(size=6),
        perceptual=random.normal(size=6),
        features=random.normal(size=9),
        motions=random.normal(size=(2, 4)),
    )
    blind = Measures(psnr=random.normal(size=6), ssim=random.normal(size=6))
    save_teacher(
        tmp_path / "teacher.npz",
        TeacherRecord(steps=48, guidance=2.5, about={"size": [32, 48]}, measures={"map-000": full, "map-001": blind}),
    )
    found = load_teacher(tmp_path / "teacher.npz")
    assert (found.steps, found.guidance, found.about) == (48, 2.5, {"size": [32, 48]})
    assert list(found.measures) == ["map-000", "map-001"]
    for name in ("psnr", "ssim", "perceptual", "features", "motions"):
        assert getattr(found.measures["map-000"], name) == pytest.approx(getattr(full, name), rel=1e-6), name
    assert found.measures["map-001"].features is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_another_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.npz: not a teacher's record"):
        load_teacher(tmp_path / "t.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(DataError, match=r"other\.npz"):
        load_teacher(tmp_path / "other.npz")
