"""The model registry on a directory store."""

import dataclasses
import json
import math
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from minwm.artifacts.registry import Lineage, ModelRegistry, ModelVersion, TrainedStage
from minwm.artifacts.store import DirectoryStore, folder_digest
from minwm.errors import ArtifactError

pytestmark = pytest.mark.unit

LINEAGE = Lineage(
    dataset="5f0c",
    parents=("aa11", "bb22"),
    stages=(TrainedStage(recipe="doom/ar", steps=300), TrainedStage(recipe="doom/dmd", steps=100)),
    code_version="0.1.0+abc",
)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def registry(store: DirectoryStore) -> ModelRegistry:
    return ModelRegistry(store)


def make_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"kind": "wan"}')
    return folder


@pytest.fixture
def three(registry: ModelRegistry, tmp_path: Path) -> list[ModelVersion]:
    """Three versions of `doom`, whose weights are `weights 1` to `weights 3`."""
    return [
        registry.register("doom", make_model(tmp_path / f"m{n}", b"weights %d" % n), LINEAGE, {"loss": 1 / n})
        for n in (1, 2, 3)
    ]


def test_a_version_reads_back_as_it_was_registered(registry: ModelRegistry, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", b"weights")
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    version = registry.register("doom", folder, LINEAGE, {"loss": 0.25, "steps": 4}, created=when)
    assert version == ModelVersion(
        name="doom",
        version=1,
        digest=folder_digest(folder),
        created="2026-01-02T01:04:05.000000+00:00",
        lineage=LINEAGE,
        metrics={"loss": 0.25, "steps": 4.0},
    )
    assert registry.get("doom") == version
    assert registry.list() == (version,)


def test_the_time_is_now_unless_given(registry: ModelRegistry, tmp_path: Path) -> None:
    version = registry.register("doom", make_model(tmp_path / "m", b"weights"), LINEAGE, {})
    assert abs(datetime.now(UTC) - datetime.fromisoformat(version.created)) < timedelta(minutes=1)


def test_versions_count_from_one_for_each_name(
    registry: ModelRegistry, three: list[ModelVersion], tmp_path: Path
) -> None:
    other = registry.register("base", tmp_path / "m1", LINEAGE, {})
    assert [version.version for version in three] == [1, 2, 3]
    assert other.version == 1
    assert registry.list() == (other, *three)


def test_a_tenth_version_is_later_than_a_ninth(registry: ModelRegistry, tmp_path: Path) -> None:
    for n in range(10):
        registry.register("doom", make_model(tmp_path / f"m{n}", b"%d" % n), LINEAGE, {})
    assert registry.get("doom").version == 10
    assert [version.version for version in registry.list()] == list(range(1, 11))


def test_equal_content_gets_a_new_number_and_is_stored_once(
    registry: ModelRegistry, store: DirectoryStore, tmp_path: Path
) -> None:
    first = registry.register("doom", make_model(tmp_path / "a", b"weights"), LINEAGE, {"loss": 1.0})
    second = registry.register("doom", make_model(tmp_path / "b", b"weights"), LINEAGE, {"loss": 2.0})
    assert (first.version, second.version) == (1, 2)
    assert first.digest == second.digest
    assert len([key for key in store.list() if key.endswith("model.safetensors")]) == 1
    assert [version.metrics["loss"] for version in registry.list()] == [1.0, 2.0]


@pytest.mark.parametrize(("ref", "number"), [("doom", 3), ("doom@2", 2), ("doom@latest", 3), ("doom@production", 1)])
def test_fetch_finds_by_number_alias_and_latest(
    registry: ModelRegistry, three: list[ModelVersion], tmp_path: Path, ref: str, number: int
) -> None:
    registry.promote("doom", 1, "production")
    folder = registry.fetch(ref, tmp_path / "deep" / "out")
    assert (folder / "model.safetensors").read_bytes() == b"weights %d" % number
    assert [path.name for path in folder.parent.iterdir()] == ["out"], "nothing is left beside it"
    assert registry.get("doom", number) == three[number - 1]


def test_fetching_again_into_the_same_folder_changes_nothing(
    registry: ModelRegistry, three: list[ModelVersion], tmp_path: Path
) -> None:
    folder = registry.fetch("doom@2", tmp_path / "out")
    before = (folder / "model.safetensors").stat()
    assert registry.fetch("doom@2", folder) == folder
    assert (folder / "model.safetensors").stat().st_ino == before.st_ino
    with pytest.raises(ArtifactError, match=r"out: cannot hold doom@3"):
        registry.fetch("doom@3", folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights 2"


def test_an_alias_moves_with_promotion(registry: ModelRegistry, three: list[ModelVersion]) -> None:
    assert registry.aliases("doom") == {}
    assert registry.promote("doom", 1, "production") == three[0]
    registry.promote("doom", 2, "candidate")
    registry.promote("doom", 3, "production")
    assert registry.get("doom", "production") == three[2]
    assert registry.aliases("doom") == {"candidate": 2, "production": 3}
    assert registry.list() == tuple(three)


@pytest.mark.parametrize("alias", ["latest", "7", "", "a/b", "../x", "Production"])
def test_an_alias_that_could_mean_something_else_is_refused(
    registry: ModelRegistry, three: list[ModelVersion], alias: str
) -> None:
    with pytest.raises(ArtifactError, match="alias"):
        registry.promote("doom", 1, alias)


def test_what_does_not_exist_is_named_with_what_does(registry: ModelRegistry, three: list[ModelVersion]) -> None:
    registry.promote("doom", 1, "production")
    with pytest.raises(ArtifactError, match=r"no model 'dom' is registered; registered are: doom"):
        registry.get("dom")
    with pytest.raises(ArtifactError, match=r"doom@4: no such version; there are 1, 2, 3"):
        registry.get("doom", 4)
    with pytest.raises(ArtifactError, match=r"doom@staging: no such alias; .* latest, production"):
        registry.get("doom", "staging")
    with pytest.raises(ArtifactError, match=r"doom@9: no such version"):
        registry.promote("doom", 9, "production")
    assert registry.aliases("doom") == {"production": 1}


@pytest.mark.parametrize("name", ["", "..", "a/b", "Doom", "doom@1", "-x", "a\n"])
def test_a_malformed_name_is_refused(registry: ModelRegistry, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="model name"):
        registry.register(name, make_model(tmp_path / "m", b"weights"), LINEAGE, {})
    with pytest.raises(ArtifactError, match="model name"):
        registry.get(name)


def test_metrics_must_be_finite(registry: ModelRegistry, store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="loss=nan of doom"):
        registry.register("doom", make_model(tmp_path / "m", b"weights"), LINEAGE, {"loss": math.nan})
    assert store.list() == ()


def test_an_empty_folder_is_no_model(registry: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no files"):
        registry.register("doom", tmp_path / "absent", LINEAGE, {})
    assert registry.list() == ()


class _DiesBeforeMetadata(DirectoryStore):
    def put_bytes(self, key: str, content: bytes, *, replace: bool = False) -> None:
        raise KeyboardInterrupt(key)


def test_a_registration_that_dies_half_way_is_never_listed(
    registry: ModelRegistry, store: DirectoryStore, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", b"weights")
    with pytest.raises(KeyboardInterrupt):
        ModelRegistry(_DiesBeforeMetadata(tmp_path / "store")).register("doom", folder, LINEAGE, {})
    assert store.list() != (), "its files are there"
    assert registry.list() == ()
    with pytest.raises(ArtifactError, match="no model 'doom'"):
        registry.get("doom")
    assert registry.register("doom", folder, LINEAGE, {}).version == 1


def test_registrations_at_the_same_time_get_numbers_of_their_own(registry: ModelRegistry, tmp_path: Path) -> None:
    folders = [make_model(tmp_path / f"m{n}", b"%d" % n) for n in range(8)]
    made: list[ModelVersion] = []
    threads = [
        threading.Thread(target=lambda folder=folder: made.append(registry.register("doom", folder, LINEAGE, {})))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.list() == tuple(sorted(made, key=lambda version: version.version))
    assert [version.version for version in registry.list()] == list(range(1, 9))
    assert {version.digest for version in made} == {folder_digest(folder) for folder in folders}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"name": "doom"',
        b"[]",
        b"\xff\xfe",
        b'{"name": "doom"}',
        b"null",
        {"version": 5},
        {"name": "other"},
        {"version": "two"},
        {"lineage": {"dataset": "x"}},
        {"surprise": 1},
        {"metrics": {"loss": "low"}},
    ],
)
def test_damaged_metadata_is_named(
    registry: ModelRegistry, store: DirectoryStore, three: list[ModelVersion], content: bytes | dict[str, object]
) -> None:
    key = "models/doom/versions/2.json"
    if isinstance(content, dict):
        content = json.dumps({**dataclasses.asdict(three[1]), **content}).encode()
    store.put_bytes(key, content, replace=True)
    for read in (lambda: registry.get("doom", 2), registry.list, lambda: registry.promote("doom", 2, "production")):
        with pytest.raises(ArtifactError, match=rf"{key}: damaged"):
            read()
    assert registry.get("doom") == three[2]


def test_a_damaged_alias_is_named(registry: ModelRegistry, store: DirectoryStore, three: list[ModelVersion]) -> None:
    store.put_bytes("models/doom/aliases/production", b"two", replace=True)
    with pytest.raises(ArtifactError, match=r"aliases/production: damaged, it holds b'two'"):
        registry.get("doom", "production")


def test_damaged_weights_are_not_handed_out(
    registry: ModelRegistry, store: DirectoryStore, three: list[ModelVersion], tmp_path: Path
) -> None:
    key = f"models/doom/contents/{three[0].digest}/model.safetensors"
    store.put_bytes(key, b"weights X", replace=True)
    with pytest.raises(ArtifactError, match=r"doom@1: its files in the store are damaged"):
        registry.fetch("doom@1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
