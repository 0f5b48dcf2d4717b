"""Who may import whom: services and pipelines stand on the library, and its parts on each other in one direction.

Reads the sources' import statements, those inside functions and `if TYPE_CHECKING` too; runs none of them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "minwm": ROOT / "libs/minwm/minwm",
    "minwm_session": ROOT / "services/session/minwm_session",
    "minwm_pipelines": ROOT / "pipelines/minwm_pipelines",
}
MAY_NOT_IMPORT = {
    "minwm": {"minwm_session", "minwm_pipelines"},
    "minwm_session": {"minwm_pipelines"},
    "minwm_pipelines": {"minwm_session"},
    "minwm.geometry": {"minwm.models", "minwm.training", "minwm.streaming"},
    "minwm.diffusion": {"minwm.models", "minwm.training", "minwm.streaming"},
    "minwm.models": {"minwm.training", "minwm.streaming"},
    "minwm.training": {"minwm.streaming"},
    "minwm.streaming": {"minwm.training"},
    "minwm.artifacts": {"minwm.models", "minwm.training", "minwm.streaming", "minwm.data"},
    "minwm.client": {"minwm.models", "minwm.training", "minwm.streaming", "minwm.data"},
}


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module of `package` imports; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = [*parents, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("importer", MAY_NOT_IMPORT)
def test_imports_follow_the_dependency_direction(importer: str) -> None:
    distribution, *parts = importer.split(".")
    folder = PACKAGES[distribution].joinpath(*parts)
    modules = sorted(folder.rglob("*.py"))
    assert modules, f"{importer}: no module under {folder}"
    violations = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in modules
        for line, name in imported_names(
            module.read_text(), ".".join([distribution, *module.parent.relative_to(PACKAGES[distribution]).parts])
        )
        if any(is_within(name, forbidden) for forbidden in MAY_NOT_IMPORT[importer])
    ]
    assert not violations, f"{importer} may not import {sorted(MAY_NOT_IMPORT[importer])}:\n" + "\n".join(violations)


@pytest.mark.parametrize(
    "statement",
    [
        "import minwm.models",
        "import minwm.models.wan as wan",
        "from minwm import models",
        "from minwm.models.wan import Wan",
        "from .. import models",
        "from ..models import wan",
        "def late():\n    from minwm.models import wan",
    ],
)
def test_every_way_to_import_a_package_is_seen(statement: str) -> None:
    names = [name for _, name in imported_names(statement, "minwm.geometry")]
    assert any(is_within(name, "minwm.models") for name in names), f"{statement!r} read as {names}"


@pytest.mark.parametrize(
    "statement", ["import minwm.models_of_cars", "from . import models", "from torch import models"]
)
def test_a_similar_name_is_not_taken_for_the_package(statement: str) -> None:
    names = [name for _, name in imported_names(statement, "minwm.geometry")]
    assert not any(is_within(name, "minwm.models") for name in names), f"{statement!r} read as {names}"
