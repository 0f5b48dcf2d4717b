"""Benchmarks run, and what they record is what ran."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from minwm.errors import ConfigError
from minwm.geometry.live import CameraVelocity
from minwm.models.backbones import Backbone
from minwm.models.context import History
from minwm.models.costs import Pass, forward_flops
from minwm.models.presets import preset
from minwm.streaming import Chunk, Fidelity, StreamingEngine, Turn
from minwm.streaming.snapshot import restore, take
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


@pytest.fixture(scope="module")
def baseline_loop() -> Iterator[ModuleType]:
    yield from script("baseline_loop")


@pytest.fixture(scope="module")
def streaming_report() -> Iterator[ModuleType]:
    yield from script("streaming_report")


@pytest.fixture(scope="module")
def streaming_worlds(models: ModuleType) -> Iterator[ModuleType]:
    yield from script("streaming_worlds")


@pytest.fixture(scope="module")
def streaming_sessions(models: ModuleType) -> Iterator[ModuleType]:
    yield from script("streaming_sessions")


@pytest.fixture(scope="module")
def streaming_length(streaming_sessions: ModuleType) -> Iterator[ModuleType]:
    yield from script("streaming_length")


@pytest.fixture(scope="module")
def streaming(
    baseline_loop: ModuleType,
    streaming_length: ModuleType,
    streaming_report: ModuleType,
    streaming_worlds: ModuleType,
) -> Iterator[ModuleType]:
    yield from script("streaming")


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
    (row,) = run(models, tmp_path, "--dtype", "float32")["figures"]
    assert row["skipped"].startswith("takes 70.6 MB beside activations, the machine has ")


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


def test_a_streaming_row_is_of_one_chunk_its_parts_and_its_rivals(streaming: ModuleType, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    what = ("--size", "16x32", "--fidelity", "2:4", "--sessions", "1", "--sessions", "2", "--length", "88")
    report = run(streaming, tmp_path, *what, "--dtype", "float32", "--plots", str(plots))
    assert [row["sessions"] for row in report["figures"]] == [1, 2]
    for row in report["figures"]:
        names = ("preset", "device", "compiled", "eight_bit", "height", "width", "chunk", "steps", "window")
        about = {name: row.pop(name) for name in names}
        assert about == {"preset": "wan-doom", "device": report["machine"]["device"], "height": 16, "width": 32} | {
            "compiled": False, "eight_bit": False, "chunk": 2, "steps": 2, "window": 4,
        }  # fmt: skip
        assert all(math.isfinite(figure) and figure > 0 for figure in row.values()), row
        parts = ("denoise_ms", "context_ms", "decode_ms", "other_ms")
        assert sum(row[part] for part in parts) == pytest.approx(row["chunk_ms"])
        assert row["fps"] == pytest.approx(8 * row["sessions"] / row["chunk_ms"] * 1e3)
        assert row["limit_fps"] * row["matmul_share"] == pytest.approx(row["fps"])
        assert row["action_to_frame_ms"] == pytest.approx(row["chunk_ms"] - row["context_ms"])
        assert {"ttff_ms", "baseline_fps", "no_cache_fps", "bytes_per_session"} <= row.keys()
        assert {"denoiser_over_limit", "baseline_over_denoiser", "fused_ms"} <= row.keys()
        assert row["snapshot_bytes"] <= 1.1 * row["bytes_per_session"]
        assert {"snapshot_ms", "snapshot_write_ms", "snapshot_read_ms", "restore_ms"} <= row.keys()
    (curve,) = report["length"]
    assert curve["frames"] == list(range(8, 89, 8)), "chunks of eight frames"
    assert len(curve["chunk_ms"]) == 11 and min(curve["chunk_ms"]) > 0
    assert curve["far"] == 100_000 and curve["late_over_early"] == curve["late_chunk_ms"] / curve["early_chunk_ms"]
    drawn = sorted(path.name for path in plots.iterdir())
    assert drawn == [f"streaming-wan-doom-16x32-2-steps-window-4{what}.svg" for what in ("-length", "")]
    for name in drawn:
        ElementTree.parse(plots / name)


def test_an_aged_session_is_the_same_farther_on(
    streaming: ModuleType, streaming_length: ModuleType, new_backbone: Callable[..., Backbone]
) -> None:
    config = new_backbone(History(chunk=2, window=4, sink=2)).config
    world = streaming.random_world(config, "32x48", streaming.Decoder.tiny, streaming.Device.cpu, torch.float32)
    engine = StreamingEngine(world, 2)
    session = engine.open(seed=3)
    for _ in range(5):
        engine.advance([Turn(session, CameraVelocity(yaw=20.0))])
        engine.settle([session])
    old = restore(engine, streaming_length.aged(take(engine, session), 100_000, 2))
    assert (old.chunks, old.frames) == (session.chunks + 100_000, session.frames + 200_000)
    assert old.rollout.frames == session.rollout.frames + 200_000
    starts = [chunk.start for chunk in session.kept]
    assert [chunk.start for chunk in old.kept] == [start + 200_000 for start in starts] != []
    turns = [Turn(one, CameraVelocity(yaw=20.0)) for one in (session, old)]
    assert all(isinstance(made, Chunk) for made in engine.advance(turns))


def test_streaming_goes_on_without_a_camera_and_with_a_text_encoder_s_prompts(
    streaming: ModuleType,
    streaming_worlds: ModuleType,
    new_backbone: Callable[..., Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Wan's own presets do, and with the tiny decoder, whose first latent frame is one RGB frame."""
    config = new_backbone(History(chunk=3, window=9), conditions=(), byte_text=False).config
    monkeypatch.setattr(streaming_worlds, "preset", lambda name: replace(config, preset=name))
    what = ("--preset", "published", "--size", "32x48", "--sessions", "1", "--chunk", "2", "--length", "0")
    report = run(streaming, tmp_path, *what, "--dtype", "float32")
    assert [(row["steps"], row["window"], row["chunk"]) for row in report["figures"]] == [
        (4, 9, 2),
        (2, 9, 2),
        (4, 4, 2),
    ]
    assert report["length"] == []
    cache = 2 * 2 * 32 * (9 * 6) * 4  # layers, keys and values, channels, tokens, bytes
    assert report["figures"][0]["bytes_per_session"] > cache, "the decoder's state is part of a session"


def test_the_limit_of_a_chunk_is_the_arithmetic_of_its_passes_and_of_its_decoding(
    streaming: ModuleType, new_backbone: Callable[..., Backbone]
) -> None:
    config = new_backbone(History(chunk=2, window=4)).config
    world = streaming.random_world(config, "32x48", streaming.Decoder.tiny, streaming.Device.cpu, torch.float32)
    work = streaming.Workload(world, Fidelity(steps=2, window=4), 3, streaming.Device.cpu)

    def flops(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no CPU kernel
            run()
        return int(counter.get_total_flops())

    with torch.inference_mode():
        limit, latents = streaming.limit(work), work.noise(2)
        shape = Pass.cached(work.history, 6)
        cameras = 2 * 2 * (2 * 6) * 16 * 32  # layers, multiply and add, tokens, four channels of q, k, v and output
        one_pass = forward_flops(config.architecture, shape).total - cameras
        assert flops(limit["products"]) == 3 * 3 * one_pass, "three sessions, two steps and the clean context"
        assert flops(limit["decode_products"]) == flops(lambda: world.autoencoder.decode(latents)) > 0


def test_what_does_not_fit_is_skipped_and_what_is_not_understood_is_refused(
    streaming: ModuleType,
    streaming_worlds: ModuleType,
    models: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "MEMORY_SHARE", 1e-6)
    report = run(streaming, tmp_path, "--size", "16x32", "--sessions", "1", "--fidelity", "1:2", "--length", "8")
    (row,) = report["figures"]
    assert row["skipped"].startswith("takes ") and report["length"] == []
    for text in ("4", "4x16", ":16", "-4:16"):
        with pytest.raises(typer.BadParameter, match="expected STEPS:WINDOW, as 4:16"):
            streaming_worlds.parse_fidelity(text)
    with pytest.raises(ConfigError, match="expected a Wan"):
        streaming_worlds.world_config("hunyuanvideo-1.5-8b", None, None)
    with pytest.raises(typer.BadParameter, match="expected HEIGHTxWIDTH"):
        streaming_worlds.random_world(
            preset("wan-doom"), "96", streaming.Decoder.tiny, streaming.Device.cpu, torch.float32
        )
