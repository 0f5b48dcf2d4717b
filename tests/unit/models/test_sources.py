"""Where weights come from: which files of a folder count, how they are read, and what is refused."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from minwm.errors import CheckpointError
from minwm.models.sources import Files, hub_patterns, resolve, weight_files

pytestmark = pytest.mark.unit


def write_shards(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """Two shards of a tensor each, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, path in zip("ab", paths, strict=True):
        save_file({name: torch.full((2,), float(ord(name)))}, path)
    named = {name: path.name for name, path in zip("ab", paths, strict=True)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return paths


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "model.pt",
        "model.pth",
    ],
)
def test_a_folder_s_transformer_is_found_beside_other_weights(tmp_path: Path, name: str) -> None:
    for other in (name, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "vae/diffusion_pytorch_model.safetensors"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    assert weight_files(tmp_path) == [tmp_path / name]
    assert weight_files(tmp_path / name) == [tmp_path / name]


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    assert weight_files(tmp_path) == paths
    assert weight_files(tmp_path / "diffusion_pytorch_model.safetensors.index.json") == paths
    files = Files(paths)
    assert {name: (value.device.type, value.dtype) for name, value in files.shapes.items()} == {
        "a": ("meta", torch.float32),
        "b": ("meta", torch.float32),
    }
    for name in "baab":
        assert torch.equal(files.read(name), torch.full((2,), float(ord(name))))


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)[1].unlink()
    with pytest.raises(CheckpointError, match=r"not there: diffusion_pytorch_model-00002-of-00002\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        weight_files(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, paths[1])
    with pytest.raises(CheckpointError, match=r"a is in diffusion_pytorch_model-00001-of-00002\.safetensors too"):
        Files(paths)


def test_a_folder_without_weights_names_what_was_looked_for_and_its_folders(tmp_path: Path) -> None:
    (tmp_path / "transformer" / "480p_i2v").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        weight_files(tmp_path)
    assert "holds no weights, expected one of model.safetensors" in str(caught.value)
    assert "480p_i2v" in str(caught.value)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"weights\.bin: expected a file of weights \(\.safetensors, \.pt, \.pth\)"
    ):
        weight_files(tmp_path / "weights.bin")


@pytest.mark.parametrize("name", ["model.pt", "model.pth"])
def test_of_a_training_checkpoint_the_averaged_generator_is_read(tmp_path: Path, name: str) -> None:
    generator, average = torch.randn(3, 2), torch.randn(3, 2)
    content = {"generator": {"w": generator}, "generator_ema": OrderedDict(w=average), "step": 7}
    torch.save(content, tmp_path / name)
    assert torch.equal(Files([tmp_path / name]).read("w"), average)
    del content["generator_ema"]
    torch.save(content, tmp_path / name)
    assert torch.equal(Files([tmp_path / name]).read("w"), generator)


def test_a_bare_state_dict_of_parameters_is_read_without_their_gradient(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    torch.save(dict(model.named_parameters()), tmp_path / "model.pth")
    read = Files([tmp_path / "model.pth"]).read("weight")
    assert torch.equal(read, model.weight)
    assert not read.requires_grad


class Hostile:
    """Unpickled by force, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"generator": {"w": torch.ones(1)}, "extra": Hostile(tmp_path / "trace")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: refused, it is damaged or holds more than weights"):
        Files([tmp_path / "model.pt"])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_damaged_files_are_refused(tmp_path: Path, keep: int) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "model.pt")
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.pt", tmp_path / "model.safetensors"):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=f"{path.name}: (damaged|refused)"):
            Files([path])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.ones(1)], "holds a list, expected tensors by name"),
        (
            {"w": torch.ones(1), "step": 3},
            "'step' is a int, expected tensors by name, or one of generator_ema, generator",
        ),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=complaint):
        Files([tmp_path / "model.pt"])


REPOSITORIES = {  # files of the published repositories, and which of them are wanted
    "Wan-AI/Wan2.1-T2V-1.3B": (
        ["config.json", "diffusion_pytorch_model.safetensors"],
        ["README.md", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"],
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
        [
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00012.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
        ],
        [
            "model_index.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model-00001-of-00005.safetensors",
        ],
    ),
    "tencent/HunyuanVideo-1.5/transformer/480p_i2v": (
        ["transformer/480p_i2v/config.json", "transformer/480p_i2v/diffusion_pytorch_model.safetensors"],
        ["config.json", "transformer/480p_t2v/diffusion_pytorch_model.safetensors", "vae/config.json"],
    ),
    "tencent/HY-WorldPlay/ar_distilled_action_model": (
        ["ar_distilled_action_model/diffusion_pytorch_model.safetensors"],
        ["config.json", "ar_model/diffusion_pytorch_model.safetensors", "wan_distilled_model/model.pt"],
    ),
    "MIN-Lab/minWM/Wan21/Action2V/dmd/model.pt": (
        ["Wan21/Action2V/dmd/model.pt"],
        ["Wan21/Action2V/causal_cd/model.pt", "HY15/Action2V/dmd/diffusion_pytorch_model.safetensors"],
    ),
}


@pytest.mark.parametrize("source", REPOSITORIES)
def test_of_a_repository_only_the_transformer_is_fetched(source: str) -> None:
    wanted, unwanted = REPOSITORIES[source]
    inside = "/".join(source.split("/")[2:])
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=hub_patterns(inside))) == wanted


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_a_repository_in_the_hub_s_cache_is_found_there(cache: Path) -> None:
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    paths = write_shards(snapshot / "deep" / "folder")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert resolve("owner/name/deep/folder") == paths


@pytest.mark.parametrize("download", [False, True])
def test_where_the_hub_is_out_of_reach_the_error_says_how_to_put_the_files_in_place(
    cache: Path, download: bool
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("tencent/HY-WorldPlay/ar_distilled_action_model", download=download)
    message = str(caught.value)
    assert ("cannot be fetched" if download else "is no local path and not in the hub's cache") in message
    assert "hf download tencent/HY-WorldPlay --include 'ar_distilled_action_model/config.json'" in message
    assert "--local-dir checkpoints/tencent/HY-WorldPlay" in message
    assert "name checkpoints/tencent/HY-WorldPlay/ar_distilled_action_model instead" in message


@pytest.mark.parametrize("source", ["nothing", "/no/such/folder", "../model.pt", "a//b", ""])
def test_what_is_neither_path_nor_repository_is_refused(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        resolve(source)


@given(share=st.floats(0.01, 0.99))
def test_a_torch_file_that_broke_off_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("broken") / "model.pt"
    torch.save({"generator": {"a": torch.randn(64, 64)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"model\.pt: "):
        Files([path])
