"""A step's figures: what they are, and that each sink gets them."""

import json
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from minwm.errors import ConfigError
from minwm.training.metrics import Figures, Journal, Pace, Work, matmul_flops, summary
from minwm.training.run import RunConfig

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def run(**changes: Any) -> RunConfig:
    return RunConfig(**{"steps": 6, "batch_size": 4, **changes})


def figures(loss: float) -> Figures:
    return Figures(
        networks={
            "generator": {"loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3},
            "critic": {"heldout_loss": 2.0},
        },
        stage={"dmd_gradient": 0.25},
        pace={"data_wait_seconds": 0.125, "samples_per_second": 8.0, "memory_bytes": 1e9},
    )


def test_speed_is_the_batch_s_over_the_step_s_duration() -> None:
    pace = Pace(run(peak_flops=1e6), Work(tokens=400, flops=2e5), CPU, world=2)
    found = pace.of_step(data_wait=0.125)
    seconds = found["step_seconds"]
    assert found["samples_per_second"] == pytest.approx(4 / seconds)
    assert found["tokens_per_second"] == pytest.approx(400 / seconds)
    assert found["flops_utilisation"] == pytest.approx(2e5 / seconds / 2e6), "of both devices' peak"
    assert found["data_wait_seconds"] == 0.125
    assert 5e7 < found["memory_bytes"] < 1e12
    assert "cuda_memory_bytes" not in found


def test_what_is_not_known_is_left_out() -> None:
    assert "tokens_per_second" not in Pace(run(), None, CPU, 1).of_step(0.0)
    found = Pace(run(), Work(tokens=1), CPU, 1).of_step(0.0)
    assert "tokens_per_second" in found and "flops_utilisation" not in found


def test_a_device_s_peak_is_measured_with_a_matrix_product() -> None:
    assert 1e7 < matmul_flops(CPU, torch.float32, size=128, repeats=2) < 1e15


def test_the_log_has_a_line_per_step_and_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    with Journal(tmp_path, run(), done=0) as journal:
        for step in range(4):
            journal.write(step, figures(float(step)))
        journal.flush()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "generator_lo')  # where the power went
    before = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["seconds"]
    with Journal(tmp_path, run(), done=2) as journal:
        journal.write(2, figures(7.0))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["generator_loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 7.0)]
    assert lines[2] == {"step": 2, **figures(7.0).flat(), "seconds": lines[2]["seconds"]}
    assert lines[2]["seconds"] >= before, "the clock goes on"


def scraped(url: str) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.name.startswith("minwm_training_") for family in families)
    return {(sample.name, *sample.labels.values()): sample.value for f in families for sample in f.samples}  # type: ignore[misc]


def test_prometheus_scrapes_the_last_step_from_a_registry_of_the_run(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with Journal(tmp_path / "a", run(metrics_port=0), 0) as journal, Journal(tmp_path / "b", run(metrics_port=0), 0):
        journal.write(0, figures(1.0))
        journal.write(1, figures(0.75))
        url, other = ((tmp_path / name / "metrics.url").read_text().strip() for name in "ab")
        assert url.startswith("http://127.0.0.1:")
        found = scraped(url)
        assert ("minwm_training_loss", "generator") not in scraped(other)
    expected = {
        ("minwm_training_steps_done",): 2,
        ("minwm_training_samples_total",): 8,
        ("minwm_training_data_wait_seconds_total",): 0.25,
        ("minwm_training_loss", "generator"): 0.75,
        ("minwm_training_grad_norm", "generator"): 0.5,
        ("minwm_training_learning_rate", "generator"): 1e-3,
        ("minwm_training_heldout_loss", "critic"): 2.0,
        ("minwm_training_stage_figure", "dmd_gradient"): 0.25,
        ("minwm_training_samples_per_second",): 8.0,
        ("minwm_training_resident_memory_bytes",): 1e9,
    }
    assert {key: found[key] for key in expected} == expected  # type: ignore[index]
    with pytest.raises(OSError):
        scraped(url)  # it ends with the run


def test_a_port_that_is_taken_is_a_configuration_error(tmp_path: Path) -> None:
    with Journal(tmp_path, run(metrics_port=0), 0):
        port = int((tmp_path / "metrics.url").read_text().strip().removesuffix("/metrics").rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"run\.metrics_port={port}: cannot be served on 127\.0\.0\.1"):
            Journal(tmp_path, run(metrics_port=port), 0)


def test_tensorboard_s_files_hold_the_figures_or_the_missing_extra_is_named(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match=r"run\.tensorboard=True: .* pip install 'minwm\[tensorboard\]'"):
            Journal(tmp_path, run(tensorboard=True), 0)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Journal(tmp_path, run(tensorboard=True), 0) as journal:
        journal.write(0, figures(1.0))
        journal.write(1, figures(0.75))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("generator/loss")] == [(0, 1.0), (1, 0.75)]


def test_a_line_for_people_has_losses_and_speed() -> None:
    line = summary({**figures(0.5).flat(), "tokens_per_second": 12345.0, "flops_utilisation": 0.416})
    assert line == (
        "generator_loss 0.5000, critic_heldout_loss 2.0000, 8 samples/s, 1.23e+04 tokens/s, 42 % of the peak, "
        "0.12 s for data"
    )
