"""Typed configuration: what is wrong in a recipe is named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from minwm.config import build, load_yaml
from minwm.errors import ConfigError

pytestmark = pytest.mark.unit


@dataclass(frozen=True, kw_only=True)
class Inner:
    frames: int = 8
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    steps: int
    rate: float = 1.0
    fast: bool = False
    engine: Literal["torch", "deepspeed"] = "torch"
    data: Path | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    window: Inner = Inner()
    parts: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {"name": "x", "steps": 3}


def test_values_become_the_annotated_types() -> None:
    values = {
        "rate": 2,
        "fast": True,
        "engine": "deepspeed",
        "data": "runs/a",
        "betas": [0, 0.5],
        "sizes": [1, 2, 3],
        "window": {"frames": 4},
        "parts": {"a": {"share": "1e-4"}},
        "free": {"anything": [1, {"at": "all"}]},
    }
    assert build(Outer, {**GOOD, **values}) == Outer(
        name="x",
        steps=3,
        rate=2.0,
        fast=True,
        engine="deepspeed",
        data=Path("runs/a"),
        betas=(0.0, 0.5),
        sizes=(1, 2, 3),
        window=Inner(frames=4),
        parts={"a": Inner(share=1e-4)},
        free={"anything": [1, {"at": "all"}]},
    )


def test_defaults_are_the_dataclass_s_own() -> None:
    assert build(Outer, GOOD) == Outer(name="x", steps=3)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stepz": 3}, "stepz: unknown key, did you mean 'steps'?"),
        ({"qqqq": 3}, "qqqq: unknown key, expected one of betas, data, engine"),
        ({"window": {"frame": 3}}, "window.frame: unknown key, did you mean 'frames'?"),
        ({"parts": {"a": {"shares": 1}}}, "parts.a.shares: unknown key, did you mean 'share'?"),
        ({"steps": "many"}, "steps: 'many' is not what was expected: int"),
        ({"steps": 1.5}, "steps: 1.5 is not what was expected: int"),
        ({"steps": True}, "steps: True is not what was expected: int"),
        ({"steps": None}, "steps: None is not what was expected: int"),
        ({"rate": "fast"}, "rate: 'fast' is not what was expected: float"),
        ({"rate": True}, "rate: True is not what was expected: float"),
        ({"fast": 1}, "fast: 1 is not what was expected: bool"),
        ({"name": 5}, "name: 5 is not what was expected: str"),
        ({"engine": "steam"}, "engine: 'steam' is not what was expected: one of ('torch', 'deepspeed')"),
        ({"data": 5}, "data: 5 is not what was expected: Path"),
        ({"betas": [1.0]}, "betas: [1.0] has 1 items, expected 2"),
        ({"betas": 1.0}, "betas: 1.0 is not what was expected"),
        ({"sizes": [1, "b"]}, "sizes[1]: 'b' is not what was expected: int"),
        ({"window": 5}, "window: 5 is not what was expected: Inner"),
        ({"parts": {"a": {"frames": "b"}}}, "parts.a.frames: 'b' is not what was expected: int"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {**GOOD, **change}, "recipe.yaml")
    assert str(caught.value).startswith(f"recipe.yaml.{complaint}")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^name: is required and missing"):
        build(Outer, {"steps": 1})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nsteps: 3\nwindow: {frames: 8}\n")
    return path


def test_overrides_reach_into_the_file_s_mappings(recipe: Path) -> None:
    values = load_yaml(recipe, ["window.frames=4", "betas=[0.1, 0.2]", "parts.a.share=0.25", "name=a=b"])
    built = build(Outer, values)
    assert built.window.frames == 4
    assert built.betas == (0.1, 0.2)
    assert built.parts["a"].share == 0.25
    assert built.name == "a=b"
    assert built.steps == 3


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps", "--set 'steps': expected key=value"),
        ("steps.more=3", "--set 'steps.more=3': 'steps' is not a mapping"),
        ("betas=[1,", "--set 'betas=[1,'"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(recipe: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(recipe, [override])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- a\n- b\n", "expected a mapping at the top, found list"),
        ("", "expected a mapping at the top, found NoneType"),
        ("a: [1,", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: {complaint}"):
        load_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such recipe"):
        load_yaml(tmp_path / "nowhere.yaml")
