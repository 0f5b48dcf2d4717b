"""The loop: order, accumulation, log, checkpoints, exact resume, and stopping on a loss that is not finite."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.errors import ConfigError, MinwmError, TrainingError
from minwm.models.backbones import Backbone
from minwm.training.batch import WindowConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import RunConfig, train
from minwm.training.stage import Stage

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]


class Line:
    """A stage in two lines of arithmetic: fit y = 2x + 1 from noisy x; `average` is a frozen network that moves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.average = nn.Linear(1, 1), nn.Linear(1, 1)
        self.networks: Mapping[str, nn.Module] = {"line": self.net}
        self.frozen: Mapping[str, nn.Module] = {"average": self.average}
        self.seen: list[tuple[list[float], list[int]]] = []

    def turns(self, step: int) -> Sequence[str]:
        return ("line",)

    def prepare(self, samples: Sequence[float], draw: Draw) -> Tensor:
        self.seen.append((list(samples), list(draw.samples)))
        return torch.tensor(samples)[:, None] + draw.normal("jitter", (1,))

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        return (self.net(batch) - 2 * batch - 1).square().mean(), {"largest": float(batch.max())}

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.average.weight.lerp_(self.net.weight, 0.5)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        folder.mkdir()
        (folder / "about.json").write_text(json.dumps(about))


OPTIMIZERS = {"line": OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay_to=0.1)}
SAMPLES = [float(x) for x in range(5)]


def run(**changes: Any) -> RunConfig:
    return RunConfig(**{"steps": 6, "batch_size": 4, "engine": "torch", "bf16": False, **changes})


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log's lines but for the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


class Interrupted(Exception):
    """Somebody pulled the plug."""


def interrupt_after(steps: int) -> Callable[[int, int, dict[str, float]], None]:
    def progress(done: int, of: int, figures: dict[str, float]) -> None:
        if done == steps:
            raise Interrupted

    return progress


def state_of(stage: Stage) -> dict[str, Tensor]:
    networks = {**stage.networks, **stage.frozen}
    return {f"{name}.{key}": v for name, net in networks.items() for key, v in net.state_dict().items()}


def test_training_reduces_the_loss_and_leaves_log_checkpoint_and_model(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []

    def progress(step: int, of: int, figures: dict[str, float]) -> None:
        done.append((step, of))

    train(Line(), SAMPLES, run(steps=200), OPTIMIZERS, tmp_path / "run", {"who": "me"}, progress)
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(200))
    assert log[-1]["line_loss"] < 0.05 * log[0]["line_loss"]
    assert {"line_grad_norm", "largest"} <= log[0].keys()
    assert done == [(n, 200) for n in range(1, 201)]
    about = json.loads((tmp_path / "run/model/about.json").read_text())
    assert about == {"who": "me", "steps": 200, "batch_size": 4, "engine": "torch"}


def test_every_epoch_visits_each_sample_once_in_a_new_order(tmp_path: Path) -> None:
    stage = Line()
    train(stage, SAMPLES, run(steps=5), OPTIMIZERS, tmp_path / "run", {})
    order = [sample for samples, _ in stage.seen for sample in samples]
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == SAMPLES for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [n for _, numbers in stage.seen for n in numbers] == list(range(20)), "samples are numbered over the run"


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    states, logs = [], []
    for accumulation in (1, 2, 4):
        stage = Line()
        train(stage, SAMPLES, run(accumulation=accumulation), OPTIMIZERS, tmp_path / str(accumulation), {})
        states.append(state_of(stage))
        logs.append(log_of(tmp_path / str(accumulation)))
    for state, log in zip(states[1:], logs[1:], strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], rtol=0, atol=1e-6)
        for line, whole in zip(log, logs[0], strict=True):
            assert line["line_loss"] == pytest.approx(whole["line_loss"], rel=1e-5)
            assert line["line_grad_norm"] == pytest.approx(whole["line_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stopped_after", [2, 3, 4, 5, 6])
def test_an_interrupted_run_goes_on_to_the_same_end_bit_for_bit(tmp_path: Path, stopped_after: int) -> None:
    """Wherever it stopped: what lay after the last checkpoint is done, and logged, again."""
    whole, config = Line(), run(checkpoint_every=2)
    train(whole, SAMPLES, config, OPTIMIZERS, tmp_path / "whole", {})
    with pytest.raises(Interrupted):
        train(Line(), SAMPLES, config, OPTIMIZERS, tmp_path / "run", {}, interrupt_after(stopped_after))
    resumed = Line()
    train(resumed, SAMPLES, config, OPTIMIZERS, tmp_path / "run", {})
    assert all(torch.equal(value, state_of(resumed)[name]) for name, value in state_of(whole).items())
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("method", ["consistency", "dmd"])
def test_real_stages_resume_bit_for_bit_with_their_averages(
    tmp_path: Path, new_backbone: Callable[..., Backbone], new_clips: NewClips, method: str
) -> None:
    window, clips = WindowConfig(frames=4), new_clips(3, 6)

    def new_stage() -> Stage:
        if method == "consistency":
            return Consistency(ConsistencyConfig(window=window), new_backbone(seed=1))
        config = DMDConfig(window=window, score=Path("unused"), steps=(2,), critic_ratio=2)
        return DMD(config, new_backbone(seed=1), new_backbone(seed=2))

    config = run(steps=6, batch_size=2, checkpoint_every=3, bf16=True)
    optimizers = {name: OptimizerConfig(learning_rate=1e-3) for name in new_stage().networks}
    whole, resumed = new_stage(), new_stage()
    train(whole, clips, config, optimizers, tmp_path / "whole", {})
    with pytest.raises(Interrupted):
        train(new_stage(), clips, config, optimizers, tmp_path / "run", {}, interrupt_after(3 + 1))
    train(resumed, clips, config, optimizers, tmp_path / "run", {})
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(resumed)[name]), name
    moved = new_stage().frozen
    for name, network in whole.frozen.items():
        if name != "teacher":
            assert not torch.equal(network.head.head.weight, moved[name].head.head.weight), f"{name} moved"


class Failing(Line):
    """Its loss is no number when it first sees sample 11."""

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(turn, batch, draw)
        return (loss * math.nan, figures) if 11 in draw.samples else (loss, figures)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 2: the loss of line is nan, samples \[8, 9, 10, 11\]"):
        train(Failing(), SAMPLES, run(checkpoint_every=2), OPTIMIZERS, tmp_path / "run", {})
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 1]
    assert not (tmp_path / "run/model").exists()
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert kept["step"] == 2, "the checkpoint of the last good steps stays"
    assert all(value.isfinite().all() for value in kept["networks"]["line"].values())


class Steep(Line):
    """Its loss is fine but has no finite gradient when it first sees sample 11."""

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(turn, batch, draw)
        return (loss + (0 * loss).sqrt() if 11 in draw.samples else loss), figures


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 2: the gradient of line has norm nan, its loss was "):
        train(Steep(), SAMPLES, run(checkpoint_every=1), OPTIMIZERS, tmp_path / "run", {})
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(value.isfinite().all() for value in kept["networks"]["line"].values())


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    train(Line(), SAMPLES, run(seed=1), OPTIMIZERS, tmp_path / "run", {})
    with pytest.raises(TrainingError, match="was made with seed 1, this run has 2; use another folder"):
        train(Line(), SAMPLES, run(seed=2), OPTIMIZERS, tmp_path / "run", {})


class Wider(Line):
    """Another network under the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"line": nn.Linear(2, 1)}


class Renamed(Line):
    """The same network under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"curve": self.net}


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (Wider(), r"checkpoint\.pt, line: does not fit the model: weight has shape \(1, 1\), expected \(1, 2\)"),
        (Renamed(), r"checkpoint\.pt: holds the networks \['average', 'line'\], this run has \['average', 'curve'\]"),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path, other: Stage, complaint: str) -> None:
    train(Line(), SAMPLES, run(), OPTIMIZERS, tmp_path / "run", {})
    with pytest.raises(MinwmError, match=complaint):
        train(other, SAMPLES, run(), {name: OptimizerConfig() for name in other.networks}, tmp_path / "run", {})


def test_a_dataset_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no samples"):
        train(Line(), [], run(), OPTIMIZERS, tmp_path / "run", {})


@pytest.mark.parametrize("names", [(), ("line", "critic"), ("lime",)])
def test_optimizers_must_be_those_of_the_stage_s_networks(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"optimizers: expected exactly \['line'\]"):
        train(Line(), SAMPLES, run(), {name: OptimizerConfig() for name in names}, tmp_path / "run", {})


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 0}, {"accumulation": 3}, {"accumulation": 0}, {"checkpoint_every": 0}]
)
def test_an_impossible_run_is_refused_with_its_numbers(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        run(**wrong)
