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

from minwm.training.engine import OptimizerConfig, TorchEngine, make_engine, make_optimizer

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


DEEPSPEED = """
import json, sys, torch
from torch import nn
from minwm.training.engine import OptimizerConfig, make_engine

final = {}
for name in ("torch", "deepspeed"):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)) for _ in range(2)]
    engines = [make_engine(name, net, OptimizerConfig(clip_norm=0.5, weight_decay=0.1)) for net in nets]
    norms = []
    for step in range(4):
        if step == 2:  # a resumed run
            states = [engine.state_dict() for engine in engines]
            engines = [make_engine(name, net, OptimizerConfig(clip_norm=0.5, weight_decay=0.1)) for net in nets]
            for engine, state in zip(engines, states):
                engine.load_state_dict(state)
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        for net, engine in zip(nets, engines):
            for part in x.split(3):
                engine.backward(5 * net(part).square().mean() / 2)
            norms.append(engine.step(0.01 / (step + 1)))
    final[name] = {"norms": norms, "weights": [p.tolist() for net in nets for p in net.parameters()]}
print("RESULT" + json.dumps(final))
"""


def test_deepspeed_trains_as_plain_torch_does() -> None:
    """In a process of its own: DeepSpeed makes a process group, which lives as long as the process."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    done = subprocess.run([sys.executable, "-c", DEEPSPEED], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    final = json.loads(done.stdout.rpartition("RESULT")[2])
    assert final["deepspeed"]["norms"] == pytest.approx(final["torch"]["norms"], rel=1e-5)
    for one, other in zip(final["deepspeed"]["weights"], final["torch"]["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-6)
