"""The slow average: its arithmetic, and its whole state. Spread over processes: test_parallel.py."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minwm.models.backbones import Backbone
from minwm.training.average import Average, gathered, update_average

pytestmark = pytest.mark.unit


def new_net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)).to(dtype)


@given(decays=st.lists(st.floats(0, 1), min_size=1, max_size=5), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_the_recursion_by_hand_in_float32(decays: list[float], dtype: torch.dtype) -> None:
    net = new_net(0, dtype)
    average = Average(net)
    expected = {name: value.detach().double() for name, value in net.named_parameters()}
    for number, decay in enumerate(decays):
        after = new_net(number + 1, dtype)
        average.update(after, decay)
        for name, value in after.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, value in average.full().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


def test_a_slow_average_does_not_lose_small_steps_of_bf16_weights() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    average = Average(net)
    nn.init.constant_(net.weight, 1.0078125)
    for _ in range(100):
        average.update(net, 0.999)
    expected = 1 + 0.0078125 * (1 - 0.999**100)
    assert float(average.full()["weight"]) == pytest.approx(expected, abs=1e-6), "bf16 itself would stay at 1"


def test_its_state_is_the_whole_average_and_goes_over_to_another() -> None:
    average = Average(new_net(0))
    average.update(new_net(1), 0.5)
    state = average.state_dict()
    assert state.keys() == dict(new_net(0).named_parameters()).keys()
    other = Average(new_net(2))
    other.load_state_dict(state)
    for name, value in other.full().items():
        assert torch.equal(value, state[name]), name


def test_it_fills_a_network(tiny_backbone: Backbone, new_backbone: Callable[..., Backbone]) -> None:
    average, network = Average(tiny_backbone.model), new_backbone(seed=1).model
    average.copy_to(network)
    for name, value in tiny_backbone.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_gathered_it_is_still_the_average_of_the_moment() -> None:
    average = Average(new_net(0))
    with gathered(new_net(0), average):
        within = average.full()
    average.update(new_net(1), 0.0)
    for (name, value), now in zip(average.full().items(), new_net(1).parameters(), strict=True):
        assert torch.equal(value, now), name
        assert not torch.equal(within[name], value) or name == "1.weight" or name == "1.bias", name


def test_a_network_that_is_an_average_moves_by_the_same_rule() -> None:
    slow, fast = new_net(0), new_net(1)
    average = Average(slow)
    average.update(fast, 0.9)
    update_average(slow, fast, 0.9)
    for value, moved in zip(average.full().values(), slow.parameters(), strict=True):
        assert torch.equal(value, moved)
