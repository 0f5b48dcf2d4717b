"""Presets have exactly the tensors of the checkpoints that they are for: every key, every shape.

The lists in fixtures/ are of the official names. Diffusers' classes, an independent source, hold the same tensors.
"""

import re
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minwm.models.backbones import new_model
from minwm.models.presets import preset
from minwm.models.published import diffusers_config, read_published
from minwm.models.sources import InMemory

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).with_name("fixtures")
PUBLISHED = sorted(path.stem for path in FIXTURES.glob("*.txt"))
BILLIONS = {"wan2.1-t2v-1.3b": 1.419, "wan2.1-t2v-14b": 14.288, "hunyuanvideo-1.5-8b": 8.327}  # of parameters

Shapes = dict[str, tuple[int, ...]]


def published(name: str) -> Shapes:
    """Keys and shapes in a list, `{0..29}` written out."""
    shapes: Shapes = {}
    for line in (FIXTURES / f"{name}.txt").read_text().splitlines():
        key, *sizes = line.split()
        run = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        numbers = [""] if run is None else [str(number) for number in range(int(run[1]), int(run[2]) + 1)]
        for number in numbers:
            shapes[key if run is None else key.replace(run[0], number)] = tuple(map(int, sizes))
    return shapes


def stand_ins(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: Any) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_the_lists_are_what_the_generator_writes() -> None:
    lists = runpy.run_path(str(FIXTURES / "generate.py"))["lists"]()
    assert {name: (FIXTURES / f"{name}.txt").read_text() for name in PUBLISHED} == lists


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_exactly_the_tensors_of_its_checkpoint(name: str) -> None:
    with torch.device("meta"):
        model = new_model(preset(name).architecture)
    _, ours = read_published(InMemory(stand_ins(published(name))), where=name)
    assert shapes_of(model.state_dict()) == shapes_of(ours.shapes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_described_without_its_memory_in_less_than_two_seconds(name: str) -> None:
    started = time.process_time()
    with torch.device("meta"):
        new_model(preset(name).architecture)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_the_official_ones_but_for_the_action_s(name: str) -> None:
    with torch.device("meta"):
        model = new_model(preset(name).architecture)
    differing = published(name).keys() ^ model.state_dict().keys()
    expected = {"action_in", "conditions"} if name == "hy-worldplay-8b" else set()
    assert {key.split(".")[0] for key in differing} == expected


def test_minwm_s_action_model_has_the_tensors_of_hy_worldplay() -> None:
    with torch.device("meta"):
        model = new_model(preset("minwm-hunyuanvideo-1.5-8b-action").architecture)
    _, ours = read_published(InMemory(stand_ins(published("hy-worldplay-8b"))), where="list")
    assert shapes_of(model.state_dict()) == shapes_of(ours.shapes)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("wan2.1-t2v-1.3b", "Wan 2.1"),
        ("wan2.1-t2v-14b", "Wan 2.1"),
        ("minwm-wan2.1-1.3b", "minWM Wan 2.1"),
        ("hunyuanvideo-1.5-8b", "HunyuanVideo-1.5"),
        ("minwm-hunyuanvideo-1.5-8b", "minWM HunyuanVideo-1.5"),
        ("hy-worldplay-8b", "HY-WorldPlay"),
    ],
)
def test_a_checkpoint_is_recognised(name: str, title: str) -> None:
    found, _ = read_published(InMemory(stand_ins(published(name))), where=name)
    assert found.title == title


@pytest.mark.parametrize("name", BILLIONS)
def test_diffusers_class_holds_the_same_tensors(name: str) -> None:
    import diffusers

    config = diffusers_config(preset(name).architecture)
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == BILLIONS[name]
    found, ours = read_published(InMemory(model.state_dict()), where="diffusers")
    assert found.title.endswith("(Diffusers)")
    assert shapes_of(ours.shapes) == published(name)
