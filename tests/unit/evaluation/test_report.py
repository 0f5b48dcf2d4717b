import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from minwm.artifacts.registry import Lineage, ModelVersion, TrainedStage
from minwm.errors import DataError
from minwm.evaluation.evaluate import EvaluationConfig, evaluate
from minwm.evaluation.report import ReportInputs, write_report
from minwm.models.worlds import World

from .html import Page

pytestmark = pytest.mark.unit

_LATENCY = {
    "model": "tiny",
    "chunks": 32,
    "frames": 256,
    "chunk_seconds": 0.457,
    "time_to_first_frame_seconds": 0.3138,
    "action_to_frame_seconds": {"p50": 0.3536, "p95": 0.5424, "max": 0.5674, "samples": 32},
    "frames_per_second": 17.44,
    "late_chunks": 1,
    "server_seconds": {"denoise": 0.132, "decode": 0.024},
}


@pytest.fixture
def inputs(world: World, dataset: Path, tmp_path: Path) -> ReportInputs:
    evaluate(world, dataset, tmp_path / "eval", EvaluationConfig(clips=2))
    (tmp_path / "latency.json").write_text(json.dumps(_LATENCY))
    (tmp_path / "played.mp4").write_bytes((tmp_path / "eval" / "clip-001.mp4").read_bytes())
    stages = {}
    for stage, steps, losses in (("autoregressive", 60, ["generator"]), ("dmd", 4, ["generator", "critic"])):
        folder = tmp_path / stage
        (folder / "model").mkdir(parents=True)
        lines = [
            {"step": step, **{f"{net}_loss": 1 / (step + 1) for net in losses}, "seconds": 0.5 * (step + 1)}
            for step in range(steps)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = {"batch_size": 4, "engine": "torch", "from": "base<1>"}
        (folder / "model" / "config.json").write_text(json.dumps({"about": about}))
        stages[stage] = folder
    lineage = Lineage(
        dataset="d1d2", parents=("p1p2",), stages=(TrainedStage(recipe="dmd", steps=4),), code_version="0.1.0"
    )
    registered = ModelVersion(
        name="tiny", version=3, digest="abc", created="2026-01-01", lineage=lineage, metrics={"control_margin": 0.04}
    )
    return ReportInputs(
        title="A <test>",
        evaluation=tmp_path / "eval",
        session_video=tmp_path / "played.mp4",
        latency=tmp_path / "latency.json",
        stages=stages,
        registered=registered,
    )


def test_the_page_shows_every_input_and_every_file_it_names_lies_beside_it(
    inputs: ReportInputs, tmp_path: Path
) -> None:
    path = write_report(tmp_path / "out", inputs)
    page = Page(path.read_text())
    assert "not measured" not in page.text.lower()
    for shown in ("A <test>", "0.542 s", "17.44", "1 of 32", "base<1>", "tiny@3", "dmd (4 steps)", "clip-001", "30.0"):
        assert shown in page.text, f"{shown!r} is not on the page"
    assert "≤ 0.663 s" in page.text  # 0.457 + 0.132 + 0.024 + 0.05
    assert len(page.addresses) == 1 + 2 + 1 + 2 * 2  # session, loss plots, PSNR plot, a strip and a video per clip
    for address in page.addresses:
        assert address.startswith("report/") and (path.parent / unquote(address)).stat().st_size > 0
    assert sorted(p.name for p in path.parent.iterdir()) == ["report", "report.html"]


def test_missing_inputs_are_named_and_nothing_is_invented(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, ReportInputs(stages={"dmd": tmp_path / "nowhere"})).read_text())
    assert "Not measured: session video, evaluation, latency, registry entry, stage dmd." in page.text
    assert not page.addresses
    assert not re.search(r"\d (s|dB|%)\b", page.text.replace("≤ 1 %", ""))


def test_a_figure_that_a_file_lacks_is_not_measured(inputs: ReportInputs, tmp_path: Path) -> None:
    latency = {
        key: value for key, value in _LATENCY.items() if key not in ("action_to_frame_seconds", "server_seconds")
    }
    (tmp_path / "latency.json").write_text(json.dumps(latency))
    page = Page(write_report(tmp_path / "out", inputs).read_text())
    assert "Action to frame, P95 not measured" in page.text
    assert "Time to first frame 0.314 s" in page.text


def test_a_resumed_runs_parts_add_up(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    clock = [(0, 2.0), (1, 4.0), (2, 6.0), (1, 3.0), (2, 6.5)]  # stopped after step 2, went on from a checkpoint at 1
    lines = [json.dumps({"step": step, "generator_loss": 1.0, "seconds": seconds}) for step, seconds in clock]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(lines))
    page = Page(write_report(tmp_path / "out", ReportInputs(stages={"ar": tmp_path / "run"})).read_text())
    assert re.search(r"ar 3 not measured not measured 12\.5", page.text)


def test_a_second_report_replaces_the_first(inputs: ReportInputs, tmp_path: Path) -> None:
    write_report(tmp_path / "out", inputs)
    write_report(tmp_path / "out", ReportInputs())
    assert list((tmp_path / "out" / "report").iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_input_is_an_error_and_leaves_the_old_page(content: str, tmp_path: Path) -> None:
    old = write_report(tmp_path / "out", ReportInputs()).read_text()
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(DataError, match=r"latency\.json"):
        write_report(tmp_path / "out", ReportInputs(latency=tmp_path / "latency.json"))
    assert (tmp_path / "out" / "report.html").read_text() == old
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report", "report.html"]
