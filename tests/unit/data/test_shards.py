"""Shards: written once, checked on reading, and never taken for a dataset when half-written."""

import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minwm.data.shards import MANIFEST, ShardReader, ShardWriter, read_manifest, read_samples
from minwm.errors import DataError

pytestmark = pytest.mark.unit

Samples = dict[str, dict[str, bytes]]


def write(folder: Path, samples: Samples, shard_bytes: int = 256 << 20) -> Path:
    with ShardWriter(folder, "things", shard_bytes=shard_bytes) as writer:
        for key, files in samples.items():
            writer.add(key, files)
        writer.about = {"who": "me"}
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six samples in three shards."""
    samples = {f"{n:06d}": {"a.npy": bytes([n]) * 6000, "json": b"{}"} for n in range(6)}
    return write(tmp_path / "dataset", samples, shard_bytes=15_000)


names = st.from_regex(r"[a-z0-9_-]{1,12}", fullmatch=True)
extensions = st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,4})?", fullmatch=True)


@settings(max_examples=40)
@given(
    samples=st.dictionaries(
        names, st.dictionaries(extensions, st.binary(max_size=600), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    shard_bytes=st.integers(1, 20_000),
)
def test_samples_come_back_in_order_from_any_number_of_shards(
    tmp_path_factory: pytest.TempPathFactory, samples: Samples, shard_bytes: int
) -> None:
    folder = write(tmp_path_factory.mktemp("data") / "d", samples, shard_bytes)
    assert list(read_samples(folder, "things")) == list(samples.items())
    reader = ShardReader(folder, "things")
    numbers = list(range(len(reader)))[::-1]
    assert {reader.key(number): reader.read(number) for number in numbers} == samples
    manifest = read_manifest(folder, "things")
    assert manifest.samples == len(samples)
    assert manifest.about == {"who": "me"}


def test_shards_are_tar_files_that_other_tools_read(dataset: Path) -> None:
    manifest = read_manifest(dataset, "things")
    assert [shard.samples for shard in manifest.shards] == [2, 2, 2]
    for shard in manifest.shards:
        with tarfile.open(dataset / shard.name) as tar:
            assert len(tar.getnames()) == 2 * shard.samples
        assert (dataset / shard.name).stat().st_size == shard.bytes
    assert sorted(path.name for path in dataset.iterdir()) == [MANIFEST, *(s.name for s in manifest.shards)]


def test_the_digest_is_the_content_s(tmp_path: Path) -> None:
    one, same, other = (
        read_manifest(write(tmp_path / name, {"a": {"x": content}}), "things").digest()
        for name, content in (("one", b"1"), ("same", b"1"), ("other", b"2"))
    )
    assert one == same != other


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_shard_is_named(dataset: Path, damage: str) -> None:
    path = dataset / "shard-00001.tar"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-5000] if damage == "truncate" else content[:700] + b"X" + content[701:])
    with pytest.raises(DataError, match=r"shard-00001\.tar: (corrupt|is named in the manifest but missing)"):
        list(read_samples(dataset, "things"))
    with pytest.raises(DataError, match=r"shard-00001\.tar: (corrupt|is named in the manifest but missing)"):
        ShardReader(dataset, "things")


def test_files_that_are_not_wanted_are_not_read(dataset: Path) -> None:
    reader = ShardReader(dataset, "things")
    assert reader.read(3, without=("a.npy",)) == {"json": b"{}"}
    assert reader.shard(3) == dataset / "shard-00001.tar"


def test_without_verification_only_sizes_and_headers_are_looked_at(dataset: Path) -> None:
    path = dataset / "shard-00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:700] + b"X" + content[701:])
    assert len(ShardReader(dataset, "things", verify=False)) == 6
    path.write_bytes(b"X" * len(content))
    with pytest.raises(DataError, match=r"shard-00001\.tar: not a tar file that can be read"):
        ShardReader(dataset, "things", verify=False)
    path.write_bytes(content[:-5000])
    with pytest.raises(DataError, match=r"shard-00001\.tar: corrupt"):
        ShardReader(dataset, "things", verify=False)


def test_an_exception_while_writing_leaves_no_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with pytest.raises(ZeroDivisionError), ShardWriter(folder, "things", shard_bytes=5000) as writer:
        for n in range(5):
            writer.add(f"{n}", {"bin": bytes(4000)})
        raise ZeroDivisionError
    assert not (folder / MANIFEST).exists()
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(DataError, match=r"not a dataset \(it has no manifest\.json\)"):
        list(read_samples(folder, "things"))
    write(folder, {"a": {"x": b"1"}})  # a second attempt may use the folder
    assert list(read_samples(folder, "things")) == [("a", {"x": b"1"})]


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample was written"):
        write(tmp_path / "d", {})
    assert not (tmp_path / "d" / MANIFEST).exists()


def test_a_dataset_is_never_written_over(dataset: Path) -> None:
    with pytest.raises(DataError, match="already holds a dataset"):
        ShardWriter(dataset, "things")


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_would_be_read_back_as_others_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="must hold neither dot nor slash"):
        write(tmp_path / "d", {key: {"x": b""}})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "others"}, "holds 'others' version 1, expected 'things' version 1"),
        ({"version": 99}, "holds 'things' version 99, expected 'things' version 1"),
        ({"shards": [{"name": "x"}]}, "not a manifest this version can read"),
        ({"colour": "red"}, "not a manifest this version can read"),
    ],
)
def test_a_manifest_of_another_kind_or_version_is_refused(
    dataset: Path, change: dict[str, object], complaint: str
) -> None:
    content = json.loads((dataset / MANIFEST).read_text())
    (dataset / MANIFEST).write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=complaint):
        read_manifest(dataset, "things")


@pytest.mark.parametrize("content", ["", "[]", '"text"', '{"kind": "things"'])
def test_a_damaged_manifest_is_refused(dataset: Path, content: str) -> None:
    (dataset / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest this version can read"):
        read_manifest(dataset, "things")
