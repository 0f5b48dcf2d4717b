import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from minwm.evaluation.evaluate import EvaluationConfig, evaluate
from minwm.evaluation.page import write_page
from minwm.models.worlds import World

from .conftest import Evaluated
from .html import Page

pytestmark = pytest.mark.unit


def test_the_page_shows_every_section_and_every_file_it_names_lies_beside_it(full: Evaluated) -> None:
    path = full.folder.with_name("page.html")
    write_page(path, full.result, full.folder)
    page, result = Page(path.read_text()), full.result
    shown = [f"{result['teacher']['fewstep_over_teacher']:.3f}", "clip-001", "maze e1m2", "1 walks of 2 s"]
    shown += [f"{result['quality']['frechet']['generated']:.3f}", f"{result['speed']['bidirectional_over_ours']:.0f}×"]
    shown += [f"{result['controllability']['real']['rotation_error_deg']:.3f}°"]
    for text in shown:
        assert text in page.text, f"{text!r} is not on the page"
    plots = 3 + 3 + 1  # quality, drift, frames in range
    assert len(page.addresses) == plots + 1 + 2 * 3  # a walk's video, a strip and a video per clip
    for address in page.addresses:
        assert (path.parent / unquote(address)).stat().st_size > 0


def test_what_was_not_measured_says_so(world: World, dataset: Path, tmp_path: Path) -> None:
    result = evaluate(world, dataset, tmp_path / "out", EvaluationConfig(clips=2))
    write_page(tmp_path / "out.html", json.loads(json.dumps(result)), tmp_path / "out")
    page = Page((tmp_path / "out.html").read_text())
    for section in ("Motion:", "Beside the teacher", "Does it last?", "How fast is it?"):
        assert f"{section} not measured" in page.text, section
    assert result["control"]["verdict"].split(":")[0] in page.text
