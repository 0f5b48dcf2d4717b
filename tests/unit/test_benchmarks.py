"""Benchmarks run, and what they record is what ran."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from minwm.models.costs import Pass, forward_flops
from minwm.models.presets import preset
from minwm.training.dry_run import plan

pytestmark = pytest.mark.unit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> Iterator[ModuleType]:
    """A script of the benchmarks, which are in no package; they import each other by name, as when they are run."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield sys.modules[name]
    del sys.modules[name]


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    yield from script("models")


@pytest.fixture(scope="module")
def training(models: ModuleType) -> Iterator[ModuleType]:
    yield from script("training")


def run(benchmark: ModuleType, folder: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes."""
    app, out = typer.Typer(), folder / "figures.json"
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, [*arguments, "--repeats", "1", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def test_every_context_is_timed_against_its_floor_and_the_machines_peak(models: ModuleType, tmp_path: Path) -> None:
    report = run(models, tmp_path, "--height", "16", "--width", "32", "--dtype", "float32")
    assert [row["context"] for row in report["figures"]] == ["bidirectional", "teacher-forced", "cached"]
    *_, cached = report["figures"]
    config = preset("wan-doom")
    assert cached["flops"] == forward_flops(config.architecture, Pass.cached(config.history, 2)).total
    assert cached["flops_per_second"] == pytest.approx(cached["flops"] / cached["seconds"]["forward"])
    assert cached["share_of_peak"] == pytest.approx(cached["flops_per_second"] / report["matrix_peak"])
    assert cached["forward_over"]["floor"] > 1


def test_a_preset_that_does_not_fit_is_skipped_and_the_report_says_so(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MEMORY_SHARE", 1e-6)
    (row,) = run(models, tmp_path)["figures"]
    assert row["skipped"].startswith("takes 35.3 MB beside activations, the machine has ")


def test_the_floor_is_every_product_and_attention_call_without_the_cameras_matrices(models: ModuleType) -> None:
    x, weight, bias, camera = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6), torch.randn(2, 4, 4)
    calls: list[tuple[int, ...]] = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            calls.append(tuple(result.shape))
            return result

    with models.Recorder() as recorder:
        y = F.linear(x, weight, bias).relu() @ weight
        y.reshape(2, 3, 4) @ camera
        F.scaled_dot_product_attention(*(torch.randn(1, 2, n, 8) for n in (5, 7, 7)))
    for small, shapes in ((False, [(3, 6), (3, 8), (1, 2, 5, 8)]), (True, [(3, 6), (3, 8), (2, 3, 4), (1, 2, 5, 8)])):
        replay = recorder.replay(small=small)
        calls.clear()
        with Count():
            replay()
        assert calls == shapes


def test_a_stage_s_step_is_timed_against_its_own_products(training: ModuleType, tmp_path: Path) -> None:
    sizes = ("--height", "16", "--width", "32", "--frames", "4", "--batch", "1")
    report = run(training, tmp_path, "--stage", "autoregressive", "--stage", "dmd", *sizes)
    assert [row["stage"] for row in report["figures"]] == ["autoregressive", "dmd"]
    for row in report["figures"]:
        seconds = row["seconds"]["step"]
        assert row["flops"] == plan(training.recipe(row["stage"], "wan-doom", 4, (2, 4), 1)).flops
        assert row["tokens_per_second"] == pytest.approx(4 * 2 / seconds)
        assert row["share_of_peak"] == pytest.approx(row["flops"] / seconds / report["matrix_peak"])
        assert row["step_over"]["floor"] > 1, row["stage"]


def test_the_floor_of_training_has_a_backward_where_the_step_had_one(training: ModuleType) -> None:
    """Forward alone: one product. With gradients of both factors: three."""
    x, weight = torch.randn(64, 32), torch.randn(16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as step, training.Products() as products:
        (F.linear(x.requires_grad_(), weight) ** 2).sum().backward()
        with torch.no_grad():
            F.linear(x, weight)
        x.reshape(-1, 4) @ torch.eye(4)
    with FlopCounterMode(display=False) as floor:
        products.again()
    product = 2 * 64 * 32 * 16
    assert floor.get_total_flops() == 4 * product
    assert step.get_total_flops() == 4 * product + 2 * 64 * 32 * 4, "the camera's product is not in the floor"
