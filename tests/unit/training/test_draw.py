"""Keyed draws: a sample's randomness is its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.randomness import generator
from minwm.training.draw import Draw

pytestmark = pytest.mark.unit

keys = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(key=keys, samples=st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True), data=st.data())
def test_a_sample_draws_the_same_in_any_batch(key: tuple[int, int], samples: list[int], data: st.DataObject) -> None:
    together = Draw(*key, samples)
    for sample in data.draw(st.permutations(samples)):
        alone, place = Draw(*key, [sample]), samples.index(sample)
        assert torch.equal(alone.normal("noise", (2, 3))[0], together.normal("noise", (2, 3))[place])
        assert torch.equal(alone.uniform("level", (2,))[0], together.uniform("level", (2,))[place])
        assert alone.integer("interval", 50)[0] == together.integer("interval", 50)[place]
        assert alone.shared_integer("exit", 8) == together.shared_integer("exit", 8)


@given(key=keys)
def test_draws_do_not_depend_on_earlier_ones(key: tuple[int, int]) -> None:
    first, second = Draw(*key, range(3)), Draw(*key, range(3))
    first.normal("noise", (100,))
    torch.randn(5)
    assert torch.equal(first.uniform("level"), second.uniform("level"))
    assert torch.equal(first.uniform("level"), second.uniform("level"))


def test_seed_step_sample_and_purpose_each_change_the_draw() -> None:
    draws = [Draw(seed, step, [sample]) for seed in (0, 1) for step in (0, 1) for sample in (0, 1)]
    values = {float(draw.uniform(purpose)) for draw in draws for purpose in ("one", "other")}
    assert len(values) == 16


def test_draws_are_distributed_as_they_say() -> None:
    draw = Draw(0, 0, range(2000))
    normal, uniform, integer = draw.normal("a", ()), draw.uniform("b"), draw.integer("c", 4)
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert torch.bincount(integer, minlength=4).min() > 400


@given(
    st.lists(st.integers() | st.text(max_size=5), max_size=4), st.lists(st.integers() | st.text(max_size=5), max_size=4)
)
def test_generators_are_a_function_of_the_whole_key(one: list[int | str], other: list[int | str]) -> None:
    same = torch.equal(torch.randn(4, generator=generator(*one)), torch.randn(4, generator=generator(*other)))
    assert same == (one == other)
