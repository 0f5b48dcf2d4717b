"""Engines: the optimizer's arithmetic, the schedule, and DeepSpeed agreeing with plain torch."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minwm.errors import CheckpointError, ConfigError
from minwm.training.engine import OptimizerConfig, TorchEngine, make_engine, make_optimizer
from minwm.training.parallel import ParallelConfig

pytestmark = pytest.mark.unit


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


@given(warmup=st.integers(0, 20), decay_to=st.floats(0, 1), steps=st.integers(1, 60))
def test_the_rate_warms_up_linearly_and_then_falls_linearly(warmup: int, decay_to: float, steps: int) -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, decay_to=decay_to)
    for step in range(steps):
        warm = 1.0 if step + 1 >= warmup else (step + 1) / warmup
        full = 0.5 + step / steps * (0.5 * decay_to - 0.5)
        assert config.rate(step, steps) == pytest.approx(warm * full)


def test_a_step_is_adamw_by_the_book_with_clipped_gradients_and_decayed_matrices() -> None:
    net, config = small_net(), OptimizerConfig(betas=(0.8, 0.9), weight_decay=0.1, clip_norm=0.5)
    engine = TorchEngine(net, config)
    weights = {name: value.detach().double().clone() for name, value in net.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(1, 4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        grads = torch.autograd.grad(10 * net(x).square().mean(), list(net.parameters()))
        for row in x:  # gradients accumulate
            engine.backward(10 * net(row).square().mean() / len(x))
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
        assert engine.step(0.01) == pytest.approx(norm, rel=1e-4), "the norm before clipping"
        assert norm > 0.5, "the test needs clipping"
        for (name, value), grad in zip(net.named_parameters(), grads, strict=True):
            g = grad.double() * 0.5 / norm
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            decay = 0.01 * 0.1 * weights[name] if value.ndim >= 2 else 0
            update = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-8)
            weights[name] = weights[name] - decay - 0.01 * update
            torch.testing.assert_close(value.detach().double(), weights[name], rtol=0, atol=2e-6)
            assert value.grad is None, "gradients are cleared"


def test_parameters_that_want_no_gradient_are_left_out() -> None:
    net = small_net()
    net[0].requires_grad_(False)  # type: ignore[operator]
    optimized = {id(p) for group in make_optimizer(net, OptimizerConfig()).param_groups for p in group["params"]}
    assert optimized == {id(p) for p in net.parameters() if p.requires_grad}


def test_state_goes_over_to_a_new_engine() -> None:
    def train(engine: TorchEngine, net: nn.Module, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            engine.backward(net(x).square().mean())
            engine.step(0.01)

    whole = small_net()
    train(TorchEngine(whole, OptimizerConfig()), whole, range(6))
    half = small_net()
    before = TorchEngine(half, OptimizerConfig())
    train(before, half, range(3))
    after = TorchEngine(half, OptimizerConfig())
    after.load_state_dict(before.state_dict())
    train(after, half, range(3, 6))
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other)


def test_plain_torch_is_what_is_asked_for() -> None:
    assert isinstance(make_engine("torch", small_net(), OptimizerConfig()), TorchEngine)


@pytest.mark.parametrize("changed", [{}, {"0.weight": torch.zeros(4, 2)}, {"9.weight": torch.zeros(1)}])
def test_state_of_another_network_is_refused(changed: dict[str, torch.Tensor]) -> None:
    state = TorchEngine(small_net(), OptimizerConfig()).state_dict()
    state["exp_avg_sq"] = state["exp_avg_sq"] | changed
    if not changed:
        del state["exp_avg_sq"]["0.weight"]
    with pytest.raises(CheckpointError, match=r"the optimizer's exp_avg_sq: does not fit the model: .*[09]\.weight"):
        TorchEngine(small_net(), OptimizerConfig()).load_state_dict(state)


def test_weights_that_no_loss_reached_are_decayed_as_zero_gradients_would() -> None:
    """ZeRO lays all gradients end to end, so that it cannot leave some out: plain torch does the same."""
    net = small_net()
    before = net[2].weight.detach().clone()  # type: ignore[union-attr, operator]
    engine = TorchEngine(net, OptimizerConfig(weight_decay=0.1))
    engine.backward(net[0](torch.ones(3)).sum())  # type: ignore[operator]
    engine.step(0.5)
    torch.testing.assert_close(net[2].weight, before * (1 - 0.5 * 0.1))


def test_plain_torch_shares_nothing_out() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.zero=2: expected 0, engine: torch"):
        make_engine("torch", small_net(), OptimizerConfig(), ParallelConfig(zero=2))


DEEPSPEED = """
import json, sys, torch
from torch import nn
from minwm.training import deepspeed_engine
from minwm.errors import CheckpointError, ConfigError
from minwm.training.engine import OptimizerConfig, make_engine
from minwm.training.parallel import ParallelConfig, Processes

deepspeed_engine.WHOLE_BELOW = 0
config = OptimizerConfig(clip_norm=0.5, weight_decay=0.1)
final = {}
for name, zero in [("torch", 0), *(("deepspeed", zero) for zero in range(4))]:
    def new_engines():
        return [make_engine(name, net, config, ParallelConfig(zero=zero)) for net in nets]

    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)) for _ in range(2)]
    engines = new_engines()
    norms = []
    for step in range(4):
        if step == 2:  # a resumed run
            states, weights = [e.state_dict() for e in engines], [e.weights() for e in engines]
            nets = [nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)) for _ in range(2)]
            for net, weight in zip(nets, weights):
                net.load_state_dict(weight)
            engines = new_engines()
            for engine, state in zip(engines, states):
                engine.load_state_dict(state)
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        for net, engine in zip(nets, engines):
            for part in x.split(3):
                engine.backward(5 * net(part).square().mean() / 2)
            norms.append(engine.step(0.01 / (step + 1)))
    weights = [value.tolist() for engine in engines for value in engine.weights().values()]
    final[f"{name}-{zero}"] = {"norms": norms, "weights": weights}
    Processes().close()  # as a run does at its end; the next one is in the same process
print("RESULT" + json.dumps(final))
"""


def test_deepspeed_trains_as_plain_torch_does_at_every_stage_of_zero() -> None:
    """One run after another in a process of its own, where DeepSpeed's process groups disturb no other test."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    done = subprocess.run([sys.executable, "-c", DEEPSPEED], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    final = json.loads(done.stdout.rpartition("RESULT")[2])
    expected = final.pop("torch-0")
    assert final.keys() == {f"deepspeed-{zero}" for zero in range(4)}
    for name, found in final.items():
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), name
        for one, other in zip(found["weights"], expected["weights"], strict=True):
            off = float((torch.tensor(one) - torch.tensor(other)).abs().max())
            assert off <= 1e-6, f"{name}: weights are off by {off}"


WITHOUT_DEEPSPEED = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "deepspeed" else found(name, package)
sys.meta_path.insert(0, Absent())

import torch
import minwm.training.average, minwm.training.recipe, minwm.training.sequence
from minwm.errors import ConfigError
from minwm.errors import CheckpointError, ConfigError
from minwm.training.engine import OptimizerConfig, make_engine

net = torch.nn.Linear(2, 1)
engine = make_engine("auto", net, OptimizerConfig())
engine.backward(net(torch.ones(2)).sum())
print(engine.name, engine.step(0.1) > 0)
try:
    make_engine("deepspeed", net, OptimizerConfig())
except ConfigError as error:
    print(error)
"""


def test_without_deepspeed_one_process_trains() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_DEEPSPEED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "torch True",
        "engine: 'deepspeed' is not installed here; install it or choose engine: torch",
    ]
