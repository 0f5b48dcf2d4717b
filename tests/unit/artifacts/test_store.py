"""The artifact store in a directory."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.artifacts.store import ArtifactStore, DirectoryStore, folder_digest
from minwm.errors import ArtifactError

pytestmark = pytest.mark.unit

FILES = {"model.safetensors": b"\x00weights\xff", "config.json": b"{}", "cards/en/card.md": "größer".encode()}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return DirectoryStore(tmp_path / "store")


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def read_folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_bytes_come_back(store: ArtifactStore) -> None:
    store.put_bytes("a/b c.bin", b"\x00\xff")
    assert store.get_bytes("a/b c.bin") == b"\x00\xff"
    assert store.exists("a/b c.bin")
    assert not store.exists("a")


def test_files_come_back(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "shard.tar"
    source.write_bytes(b"tar" * 1000)
    store.put_file("data/1/shard.tar", source)
    target = tmp_path / "new" / "copy.tar"
    assert store.get_file("data/1/shard.tar", target) == target
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["copy.tar"], "nothing is left beside it"


def test_folders_come_back(store: ArtifactStore, tmp_path: Path) -> None:
    store.put_folder("models/doom", make_folder(tmp_path / "in", FILES))
    assert store.list("models") == tuple(sorted(f"models/doom/{name}" for name in FILES))
    assert store.get_bytes("models/doom/cards/en/card.md") == FILES["cards/en/card.md"]
    (tmp_path / "out").mkdir()
    assert read_folder(store.get_folder("models/doom", tmp_path / "out")) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"store", "in", "out"}


def test_listing_goes_by_whole_parts(store: ArtifactStore) -> None:
    for key in ("a/b", "a/c/d", "ab", "z"):
        store.put_bytes(key, b"x")
    assert store.list() == ("a/b", "a/c/d", "ab", "z")
    assert store.list("a") == ("a/b", "a/c/d")
    assert store.list("nothing/here") == ()


def test_an_artifact_is_immutable_unless_replaced(store: ArtifactStore, tmp_path: Path) -> None:
    store.put_bytes("a/b", b"first")
    store.put_bytes("a/b", b"first")
    with pytest.raises(ArtifactError, match=r"a/b: .*store already holds other content"):
        store.put_bytes("a/b", b"second")
    assert store.get_bytes("a/b") == b"first"
    (tmp_path / "third").write_bytes(b"third")
    store.put_file("a/b", tmp_path / "third", replace=True)
    assert store.get_bytes("a/b") == b"third"


@pytest.mark.parametrize(
    "other", [{**FILES, "config.json": b"[]"}, {**FILES, "more": b""}, {"config.json": FILES["config.json"]}]
)
def test_a_folder_is_immutable(store: ArtifactStore, tmp_path: Path, other: dict[str, bytes]) -> None:
    store.put_folder("m", make_folder(tmp_path / "one", FILES))
    store.put_folder("m", make_folder(tmp_path / "same", FILES))
    with pytest.raises(ArtifactError, match="already holds other content"):
        store.put_folder("m", make_folder(tmp_path / "other", other))
    assert read_folder(store.get_folder("m", tmp_path / "out")) == FILES


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\n", "a\0", ".partial/x"]
)
def test_a_malformed_key_is_refused(store: ArtifactStore, key: str) -> None:
    for use in (lambda: store.put_bytes(key, b"x"), lambda: store.get_bytes(key), lambda: store.exists(key)):
        with pytest.raises(ArtifactError, match="not a key"):
            use()


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b"]), max_size=6))
def test_no_key_leads_out_of_the_root(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("keys")
    try:
        DirectoryStore(folder / "deep" / "store").put_bytes("/".join(parts), b"x")
    except ArtifactError:
        assert not folder.joinpath("deep").exists()
    else:
        assert [path for path in folder.rglob("*") if path.is_file()] == [folder.joinpath("deep/store", *parts)]


def test_a_link_in_the_root_does_not_lead_out(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store.put_bytes("a", b"x")
    (tmp_path / "store" / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="leads out of"):
        store.get_bytes("link/secret")


def test_what_is_missing_is_named_with_its_store(store: ArtifactStore, tmp_path: Path) -> None:
    for use in (
        lambda: store.get_bytes("no/such"),
        lambda: store.get_file("no/such", tmp_path / "x"),
        lambda: store.get_folder("no/such", tmp_path / "y"),
    ):
        with pytest.raises(ArtifactError, match=rf"no/such: no such .* in {tmp_path}/store"):
            use()
    assert list(tmp_path.iterdir()) == [], "a failed get leaves nothing"


def test_keys_that_need_a_file_to_be_a_folder_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    store.put_bytes("a/b", b"x")
    with pytest.raises(ArtifactError, match="a/b/c"):
        store.put_bytes("a/b/c", b"x")
    with pytest.raises(ArtifactError, match="a: "):
        store.put_bytes("a", b"x", replace=True)
    with pytest.raises(ArtifactError, match="a/b: "):
        store.put_folder("a/b", make_folder(tmp_path / "in", FILES))


def test_folders_that_hold_nothing_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ArtifactError, match="holds no files"):
            store.put_folder("m", folder)
    with pytest.raises(ArtifactError, match="absent"):
        store.put_file("f", tmp_path / "absent")
    assert store.list() == ()


def test_a_folder_is_never_fetched_over_other_files(store: ArtifactStore, tmp_path: Path) -> None:
    store.put_folder("m", make_folder(tmp_path / "in", FILES))
    mine = make_folder(tmp_path / "mine", {"notes": b"mine"})
    with pytest.raises(ArtifactError, match="mine: already exists"):
        store.get_folder("m", mine)
    assert read_folder(mine) == {"notes": b"mine"}


def test_what_a_killed_writer_left_aside_is_no_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    make_folder(tmp_path / "store" / ".partial" / ".partial-x1", {"folder/model.safetensors": b"half"})
    assert store.list() == ()
    store.put_bytes("a", b"x")
    assert store.list() == ("a",)


def test_a_folder_that_fails_half_way_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", FILES)
    (folder / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="dangling"):
        store.put_folder("m", folder)
    assert store.list() == ()


def test_of_many_writers_of_one_key_one_succeeds(store: ArtifactStore) -> None:
    outcomes: list[bytes | None] = []

    def write(content: bytes) -> None:
        try:
            store.put_bytes("key", content)
            outcomes.append(content)
        except ArtifactError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(b"%d" % n * 1000,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome for outcome in outcomes if outcome is not None] == [store.get_bytes("key")]
    assert len(outcomes) == 8


names = st.sampled_from(["a", "b", "c/a", "c/b"])
trees = st.dictionaries(names, st.binary(max_size=3), min_size=1)


@given(trees, trees)
def test_digests_are_equal_just_where_contents_are(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("trees")
    digests = [folder_digest(make_folder(folder / name, files)) for name, files in (("1", one), ("2", other))]
    assert (digests[0] == digests[1]) == (one == other)
