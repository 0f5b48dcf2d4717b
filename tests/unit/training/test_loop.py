"""The loop: order, accumulation, log, checkpoints, exact resume, and stopping on a loss that is not finite."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.data.episode import Episode
from minwm.errors import ConfigError, MinwmError, TrainingError
from minwm.models.autoencoder import AutoencoderConfig, DecoderConfig
from minwm.models.backbones import Backbone
from minwm.models.layout import LatentLayout
from minwm.models.text import byte_tokens
from minwm.training.autoencoder import AutoencoderStage, AutoencoderStageConfig
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import WindowConfig, cut_windows
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.checkpointing import Checkpoints
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.decoder import DecoderStage, DecoderStageConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import train
from minwm.training.run import RunConfig
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
        self.fixed: Mapping[str, nn.Module] = {}
        self.seen: list[tuple[list[float], list[int]]] = []

    def turns(self, step: int) -> Sequence[str]:
        return ("line",)

    def prepare(self, samples: Sequence[float], draw: Draw) -> Tensor:
        self.seen.append((list(samples), list(draw.samples)))
        return torch.tensor(samples)[:, None] + draw.normal("jitter", (1,))

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        return (self.net(batch) - 2 * batch - 1).square().mean(), {"mean": float(batch.mean())}

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.average.weight.lerp_(self.net.weight, 0.5)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "about.json").write_text(json.dumps(about))


OPTIMIZERS = {"line": OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay_to=0.1)}
SAMPLES = [float(x) for x in range(5)]


def run(**changes: Any) -> RunConfig:
    return RunConfig(**{"steps": 6, "batch_size": 4, "engine": "torch", "bf16": False, "loaders": 0, **changes})


CLOCKS = {"seconds", "step_seconds", "data_wait_seconds", "samples_per_second", "tokens_per_second", "memory_bytes"}


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log's lines but for clocks and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def kept(folder: Path) -> list[int]:
    return Checkpoints(folder, keep=1).steps()


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


def assert_same(one: Stage, other: Stage) -> None:
    """Bit for bit."""
    for name, value in state_of(other).items():
        assert torch.equal(value, state_of(one)[name]), name


def test_training_reduces_the_loss_and_leaves_log_checkpoint_and_model(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []

    def progress(step: int, of: int, figures: dict[str, float]) -> None:
        done.append((step, of))

    train(Line(), SAMPLES, run(steps=200), OPTIMIZERS, tmp_path / "run", {"who": "me"}, progress)
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(200))
    assert log[-1]["line_loss"] < 0.05 * log[0]["line_loss"]
    assert {"line_grad_norm", "line_learning_rate", "mean"} <= log[0].keys()
    assert kept(tmp_path / "run") == [200]
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
            assert line["mean"] == pytest.approx(whole["mean"], rel=1e-5), "what a stage says is averaged too"


@pytest.mark.parametrize("stopped_after", [2, 3, 4, 5, 6])
def test_an_interrupted_run_goes_on_to_the_same_end_bit_for_bit(tmp_path: Path, stopped_after: int) -> None:
    """Wherever it stopped: what lay after the last checkpoint is done, and logged, again."""
    whole, config = Line(), run(checkpoint_every=2)
    train(whole, SAMPLES, config, OPTIMIZERS, tmp_path / "whole", {})
    with pytest.raises(Interrupted):
        train(Line(), SAMPLES, config, OPTIMIZERS, tmp_path / "run", {}, interrupt_after(stopped_after))
    resumed = Line()
    train(resumed, SAMPLES, config, OPTIMIZERS, tmp_path / "run", {})
    assert_same(resumed, whole)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def new_stage(method: str, new_backbone: Callable[..., Backbone]) -> Stage:
    window = WindowConfig(frames=4)
    match method:
        case "autoencoder":
            small = AutoencoderConfig(latent_channels=4, widths=(6, 8, 10))
            return AutoencoderStage(AutoencoderStageConfig(model=small, latent_frames=2), seed=1)
        case "decoder":
            layout = LatentLayout(channels=4, pixels=8, leading=False)
            return DecoderStage(
                DecoderStageConfig(model=DecoderConfig(layout=layout, widths=(8, 8, 10)), latent_frames=3, warm=1), 1
            )
        case "bidirectional":
            return Bidirectional(BidirectionalConfig(window=window), new_backbone(seed=1))
        case "autoregressive":
            return Autoregressive(AutoregressiveConfig(window=window), new_backbone(seed=1))
        case "consistency":
            return Consistency(ConsistencyConfig(window=window), new_backbone(seed=1))
    config = DMDConfig(window=window, score=Path("unused"), steps=(2,), critic_ratio=2)
    return DMD(config, new_backbone(seed=1), new_backbone(seed=2))


STAGES = ("autoencoder", "decoder", "bidirectional", "autoregressive", "consistency", "dmd")


@pytest.mark.parametrize("method", STAGES)
def test_every_stage_resumes_bit_for_bit_with_its_averages_and_moments(
    tmp_path: Path,
    new_backbone: Callable[..., Backbone],
    new_clips: NewClips,
    new_episodes: Callable[[int, int], list[Episode]],
    method: str,
) -> None:
    samples: list[Any] = new_episodes(3, 12) if method == "autoencoder" else new_clips(3, 6)
    whole, stopped, resumed, fresh = (new_stage(method, new_backbone) for _ in range(4))
    config = run(steps=4, batch_size=2, checkpoint_every=2, bf16=True)
    optimizers = dict.fromkeys(whole.networks, OptimizerConfig(learning_rate=1e-3))
    train(whole, samples, config, optimizers, tmp_path / "whole", {})
    with pytest.raises(Interrupted):
        train(stopped, samples, config, optimizers, tmp_path / "run", {}, interrupt_after(2 + 1))
    train(resumed, samples, config, optimizers, tmp_path / "run", {})
    assert_same(resumed, whole)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    for name in whole.networks.keys() | whole.frozen.keys():
        before, after = ({**stage.networks, **stage.frozen}[name].state_dict() for stage in (fresh, whole))
        assert any(not torch.equal(value, after[key]) for key, value in before.items()), f"{name} moved"


def test_a_run_begun_in_bf16_does_not_go_on_where_a_machine_would_compute_it_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(bf16=True, checkpoint_every=2)
    monkeypatch.setattr("minwm.training.run.native_dtype", lambda device: torch.bfloat16)
    with pytest.raises(Interrupted):
        train(Line(), SAMPLES, config, OPTIMIZERS, tmp_path, {}, interrupt_after(3))
    monkeypatch.setattr("minwm.training.run.native_dtype", lambda device: torch.float32)
    with pytest.raises(TrainingError, match="bf16"):
        train(Line(), SAMPLES, config, OPTIMIZERS, tmp_path, {})


class Failing(Line):
    """Its loss is no number when it first sees sample 11."""

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(turn, batch, draw)
        return (loss * math.nan, figures) if 11 in draw.samples else (loss, figures)


def test_a_loss_that_is_not_finite_stops_the_run_with_step_network_samples_and_batch(tmp_path: Path) -> None:
    complaint = r"step 2: the loss of line is nan; samples 10, 11; the batch is in .*bad-batch\.pt"
    stage = Failing()
    with pytest.raises(TrainingError, match=complaint):
        train(stage, SAMPLES, run(checkpoint_every=2, accumulation=2), OPTIMIZERS, tmp_path / "run", {})
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 1]
    assert not (tmp_path / "run/model").exists()
    good = Checkpoints(tmp_path / "run", keep=1).newest()
    assert good is not None and good.step == 2, "the checkpoint of the last good steps stays"
    assert all(value.isfinite().all() for value in good.state["networks"]["line"].values())
    bad = torch.load(tmp_path / "run/bad-batch.pt", weights_only=True)
    assert bad["network"] == "line" and bad["samples"] == ["10", "11"]
    again = Draw(bad["draws"]["seed"], bad["draws"]["step"], bad["draws"]["numbers"])
    samples = stage.seen[-1][0]
    assert torch.equal(bad["batches"][0], Line().prepare(samples, again)), "the draws can be made again"


class Steep(Line):
    """Its loss is fine but has no finite gradient when it first sees sample 11."""

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(turn, batch, draw)
        return (loss + (0 * loss).sqrt() if 11 in draw.samples else loss), figures


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_kept(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"step 2: the gradient of line has norm nan, its loss was .*; samples 8, 9"
    ):
        train(Steep(), SAMPLES, run(checkpoint_every=1), OPTIMIZERS, tmp_path / "run", {})
    good = Checkpoints(tmp_path / "run", keep=1).newest()
    assert good is not None and good.step == 2
    assert all(value.isfinite().all() for value in good.state["networks"]["line"].values())
    assert torch.load(tmp_path / "run/bad-batch.pt", weights_only=True)["draws"]["numbers"] == [8, 9, 10, 11]


def test_a_batch_of_dataclasses_is_kept_as_plain_data(new_clips: NewClips, tmp_path: Path) -> None:
    class Odd(Line):
        def prepare(self, samples: Sequence[Any], draw: Draw) -> Any:
            return cut_windows(samples, draw, WindowConfig(frames=4), lambda texts: byte_tokens(texts, 12))

        def loss(self, turn: str, batch: Any, draw: Draw) -> tuple[Tensor, dict[str, float]]:
            return self.net.weight.sum() * math.inf, {}

    with pytest.raises(TrainingError, match=r"step 0: the loss of line is -?inf; samples clip-\d, clip-\d"):
        train(Odd(), new_clips(3, 6), run(batch_size=2), OPTIMIZERS, tmp_path / "run", {})
    (batch,) = torch.load(tmp_path / "run/bad-batch.pt", weights_only=True)["batches"]
    assert batch["latents"].shape == (2, 4, 4, 4, 6)
    assert batch["conditions"]["cameras"]["viewmats"].shape == (2, 4, 4, 4)
    assert batch["text"].shape == (2, 12)


@pytest.mark.parametrize(
    ("changes", "optimizer", "identity", "complaint"),
    [
        ({"seed": 2}, {}, {}, "run.seed=1 where this run has 2"),
        ({"batch_size": 2}, {}, {}, "run.batch_size=4 where this run has 2"),
        ({}, {"learning_rate": 0.2}, {}, "optimizers.line.learning_rate=0.1 where this run has 0.2"),
        ({}, {"betas": (0.8, 0.9)}, {}, r"optimizers.line.betas=\[0.9, 0.99\] where this run has \[0.8, 0.9\]"),
        ({}, {}, {"dataset": "b"}, "dataset='a' where this run has 'b'"),
        ({}, {}, {"method": {"window": {"frames": 8}}}, "method.window.frames=4 where this run has 8"),
    ],
)
def test_a_checkpoint_of_another_recipe_or_dataset_is_refused_with_the_difference_named(
    tmp_path: Path, changes: dict[str, Any], optimizer: dict[str, Any], identity: dict[str, Any], complaint: str
) -> None:
    was = {"dataset": "a", "method": {"window": {"frames": 4}}}
    train(Line(), SAMPLES, run(seed=1), OPTIMIZERS, tmp_path / "run", {}, identity=was)
    config = run(**{"seed": 1, **changes})
    optimizers = {"line": replace(OPTIMIZERS["line"], **optimizer)}
    with pytest.raises(TrainingError, match=f"was made with {complaint}; use another folder, or go on from its w"):
        train(Line(), SAMPLES, config, optimizers, tmp_path / "run", {}, identity={**was, **identity})


def test_length_saving_and_speed_may_change_between_starts(tmp_path: Path) -> None:
    """Only a falling learning rate depends on the number of steps."""
    optimizers = {"line": replace(OPTIMIZERS["line"], decay_to=1.0)}
    whole, resumed = Line(), Line()
    train(whole, SAMPLES, run(), optimizers, tmp_path / "whole", {})
    train(Line(), SAMPLES, run(steps=3, keep=1, loaders=0), optimizers, tmp_path / "run", {})
    train(resumed, SAMPLES, run(checkpoint_every=1, loaders=3, log_every=2), optimizers, tmp_path / "run", {})
    assert_same(resumed, whole)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    with pytest.raises(TrainingError, match=r"step-000006: has done more than run\.steps=3"):
        train(Line(), SAMPLES, run(steps=3), optimizers, tmp_path / "run", {})


def test_going_on_from_weights_takes_networks_and_step_but_no_moments_and_is_then_exact_itself(tmp_path: Path) -> None:
    config, gentle = run(resume="weights", checkpoint_every=4), {"line": replace(OPTIMIZERS["line"], betas=(0.5, 0.9))}
    for name in ("whole", "run"):
        train(Line(), SAMPLES, run(steps=3), OPTIMIZERS, tmp_path / name, {})
    whole, resumed = Line(), Line()
    train(whole, SAMPLES, config, gentle, tmp_path / "whole", {})
    assert [line["step"] for line in log_of(tmp_path / "whole")] == list(range(6))
    with pytest.raises(Interrupted):
        train(Line(), SAMPLES, config, gentle, tmp_path / "run", {}, interrupt_after(5))
    train(resumed, SAMPLES, config, gentle, tmp_path / "run", {})
    assert_same(resumed, whole)


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
        (Wider(), r"step-000006, line: does not fit the model: weight has shape \(1, 1\), expected \(1, 2\)"),
        (Renamed(), r"step-000006: holds the networks \['average', 'line'\], this run has \['average', 'curve'\]"),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path, other: Stage, complaint: str) -> None:
    train(Line(), SAMPLES, run(), OPTIMIZERS, tmp_path / "run", {})
    with pytest.raises(MinwmError, match=complaint):
        train(
            other,
            SAMPLES,
            run(resume="weights"),
            dict.fromkeys(other.networks, OptimizerConfig()),
            tmp_path / "run",
            {},
        )


def test_a_dataset_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no samples"):
        train(Line(), [], run(), OPTIMIZERS, tmp_path / "run", {})


@pytest.mark.parametrize("names", [(), ("line", "critic"), ("lime",)])
def test_optimizers_must_be_those_of_the_stage_s_networks(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"optimizers: expected exactly \['line'\]"):
        train(Line(), SAMPLES, run(), {name: OptimizerConfig() for name in names}, tmp_path / "run", {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"accumulation": 3},
        {"accumulation": 0},
        {"checkpoint_every": 0},
        {"keep": 0},
        {"loaders": -1},
        {"validate_samples": 0},
        {"metrics_port": 70000},
        {"peak_flops": 0.0},
    ],
)
def test_an_impossible_run_is_refused_with_its_numbers(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        run(**wrong)


def test_the_best_cannot_be_exported_where_nothing_finds_it() -> None:
    with pytest.raises(ConfigError, match=r"run.export='best': expected validate_every > 0"):
        run(export="best")


class Swinging(Line):
    """Its steps are too large: held-out losses go up and down."""

    exported: float

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.exported = self.net.weight.item()


HELDOUT = [float(x) for x in range(3, 6)]


def test_the_checkpoint_with_the_lowest_heldout_loss_is_kept_and_can_be_exported(tmp_path: Path) -> None:
    optimizers = {"line": OptimizerConfig(learning_rate=1.0)}
    config, stage = run(steps=12, validate_every=1, validate_samples=2, checkpoint_every=5, keep=1), Swinging()
    train(stage, SAMPLES, config, optimizers, tmp_path / "run", {}, heldout=HELDOUT)
    losses = [line["line_heldout_loss"] for line in log_of(tmp_path / "run")]
    best = losses.index(min(losses)) + 1
    assert best < 12, "else this shows nothing"
    assert kept(tmp_path / "run") == [best, 12]
    at_best = Checkpoints(tmp_path / "run", 1).read(best).state["networks"]["line"]["weight"]
    assert stage.exported == stage.net.weight.item() != at_best.item(), "the last, unless asked"
    again = Swinging()
    train(again, SAMPLES, replace(config, export="best"), optimizers, tmp_path / "run", {}, heldout=HELDOUT)
    assert again.exported == at_best.item()


def test_asking_for_heldout_losses_changes_no_training(tmp_path: Path) -> None:
    with_, without = Line(), Line()
    train(with_, SAMPLES, run(validate_every=2), OPTIMIZERS, tmp_path / "with", {}, heldout=HELDOUT)
    train(without, SAMPLES, run(), OPTIMIZERS, tmp_path / "without", {})
    assert_same(with_, without)
    assert [line["step"] for line in log_of(tmp_path / "with") if "line_heldout_loss" in line] == [1, 3, 5]


def test_heldout_losses_need_heldout_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.validate_every=2: the dataset has 0 held-out samples"):
        train(Line(), SAMPLES, run(validate_every=2), OPTIMIZERS, tmp_path / "run", {})
