"""Weights on disk: strict loading with every misfit listed, damage refused, folders written whole."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minwm.errors import CheckpointError, ConfigError
from minwm.geometry.live import Speeds
from minwm.models.autoencoder import Autoencoder
from minwm.models.backbones import Backbone, load_backbone, new_backbone, save_backbone
from minwm.models.checkpoints import (
    CONFIG,
    WEIGHTS,
    check_fit,
    load_autoencoder,
    load_tensors,
    load_weights,
    read_config,
    read_weights,
    save_autoencoder,
    save_model,
    write_folder,
)
from minwm.models.sources import InMemory
from minwm.models.worlds import load_world, save_world

pytestmark = pytest.mark.unit


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of kind `net`."""
    torch.manual_seed(0)
    save_model(tmp_path / "net", nn.Linear(3, 2), kind="net", config=Size(), about={"steps": 5})
    return tmp_path / "net"


def test_a_folder_holds_bf16_weights_their_configuration_and_provenance(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert read_config(folder, "net") == {"kind": "net", "config": {"width": 3}, "about": {"steps": 5}}
    model = nn.Linear(3, 2)
    load_weights(model, folder)
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(3, 2).weight.bfloat16().float())


def test_every_missing_unexpected_and_misshapen_key_is_listed(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({"weight": torch.zeros(2, 4), "scale": torch.zeros(1), "prope": torch.zeros(1)}, folder / WEIGHTS)
    assert weights.keys() == {"weight", "bias"}
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Linear(3, 2), folder)
    message = str(caught.value)
    assert str(folder) in message
    for problem in (
        "missing bias",
        "unexpected prope",
        "unexpected scale",
        "weight has shape (2, 4), expected (2, 3)",
    ):
        assert problem in message


def test_a_misfit_leaves_the_model_as_it_was(folder: Path) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(5)}, folder / WEIGHTS)
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError):
        load_weights(model, folder)
    assert torch.equal(model.weight, before)


def test_a_perfect_fit_is_silent() -> None:
    check_fit({"a": torch.zeros(2)}, {"a": torch.ones(2)}, where="here")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_weights(nn.Linear(3, 2), folder)


def test_folders_that_are_no_model_or_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: not a model folder \(it has no config\.json\)"):
        read_config(tmp_path / "nothing", "net")
    with pytest.raises(CheckpointError, match="holds a 'net', expected a 'backbone'"):
        load_backbone(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_weights(nn.Linear(3, 2), folder)


@pytest.mark.parametrize("content", ["", '{"kind": "net", "conf', "[]", '{"kind": "net"}'])
def test_a_damaged_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(folder, "net")


def test_a_failed_save_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_model(tmp_path / "net", nn.Linear(3, 2), kind="net", config="no dataclass")
    assert not (tmp_path / "net").exists()
    save_model(tmp_path / "net", nn.Linear(3, 2), kind="net", config=Size())
    load_weights(nn.Linear(3, 2), tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"], "no remains of the failed attempt"


def test_a_failed_save_over_an_old_model_leaves_the_old_one(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError):
        save_model(folder, nn.Linear(3, 2), kind="net", config="no dataclass")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_over_an_old_model_replaces_it(folder: Path) -> None:
    model = nn.Linear(3, 2)
    save_model(folder, model, kind="net", config=Size(width=4), dtype=torch.float32)
    assert torch.equal(load_file(folder / WEIGHTS)["weight"], model.weight)
    assert read_config(folder, "net")["config"] == {"width": 4}
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_large_weights_are_split_and_read_as_one(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.randn(10, 10) for number in range(5)} | {"step": torch.tensor(3)}
    write_folder(tmp_path / "net", InMemory(tensors), {"kind": "net"}, shard_bytes=900)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [CONFIG, *shards, f"{WEIGHTS}.index.json"]
    index = json.loads((tmp_path / "net" / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 400 + 8}
    assert index["weight_map"] == {name: shards[place] for name, place in zip(tensors, (0, 0, 1, 1, 2, 2), strict=True)}
    files = read_weights(tmp_path / "net")
    assert files.shapes.keys() == tensors.keys()
    assert all(torch.equal(files.read(name), value) for name, value in tensors.items())


def test_a_cast_leaves_whole_numbers_alone(tmp_path: Path) -> None:
    tensors = {"weight": torch.tensor([1.001]), "step": torch.tensor(123456789)}
    write_folder(tmp_path / "net", InMemory(tensors), {}, dtype=torch.bfloat16)
    files = read_weights(tmp_path / "net")
    assert torch.equal(files.read("weight"), torch.tensor([1.001]).bfloat16())
    assert torch.equal(files.read("step"), tensors["step"])


def test_saving_over_shards_leaves_none_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    write_folder(folder, InMemory(nn.Linear(30, 20).state_dict()), {"kind": "net"}, shard_bytes=100)
    (folder / "card.md").write_text("kept")
    model = nn.Linear(3, 2)
    save_model(folder, model, kind="net", config=Size(), dtype=torch.float32)
    assert sorted(path.name for path in folder.iterdir()) == ["card.md", CONFIG, WEIGHTS]
    loaded = nn.Linear(3, 2)
    load_weights(loaded, folder)
    assert torch.equal(loaded.weight, model.weight)


def test_weights_are_as_readable_as_their_configuration(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_model_without_memory_is_given_the_weights_in_its_dtype(folder: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2).to(torch.float16)
    model.weight.requires_grad_(False)
    load_weights(model, folder)
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(3, 2).weight.bfloat16().half())
    assert isinstance(model.weight, nn.Parameter)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)
    (folder / WEIGHTS).unlink()
    assert model(torch.ones(1, 3, dtype=torch.float16)).shape == (1, 2), "the file is not needed any more"


def test_buffers_are_given_too() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    expected = {name: torch.rand(value.shape).to(value.dtype) for name, value in model.state_dict().items()}
    load_tensors(model, InMemory(expected), where="here")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert {name for name, _ in model.named_buffers()} == {"running_mean", "running_var", "num_batches_tracked"}


def test_what_may_be_missing_stays_as_it_is(folder: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_parameter("branch", nn.Parameter(torch.full((2,), 7.0)))
    with pytest.raises(CheckpointError, match="missing branch"):
        load_weights(model, folder)
    load_weights(model, folder, missing_ok={"branch"})
    assert torch.equal(model.branch, torch.full((2,), 7.0))


PEAKS = """
import json, tempfile, torch
from pathlib import Path
from torch import nn
from minwm.models.checkpoints import load_weights, write_folder
from minwm.models.sources import Files, InMemory, weight_files

def megabytes(field):
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def peak(action):
    open("/proc/self/clear_refs", "w").write("5")  # counts from here
    before = megabytes("VmRSS")
    action()
    return megabytes("VmHWM") - before

def net(device):
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(4096, 2112, bias=False) for _ in range(8)))

folder = tempfile.TemporaryDirectory()
work = Path(folder.name)
model = net("cpu")
for parameter in model.parameters():
    parameter.data.fill_(1)
write_folder(work / "whole", InMemory(model.state_dict()), {})
write_folder(work / "split", InMemory(model.state_dict()), {}, shard_bytes=40 * 2**20)
peaks = {
    "load one file": peak(lambda: load_weights(model, work / "whole")),
    "load shards": peak(lambda: load_weights(model, work / "split")),
    "convert": peak(
        lambda: write_folder(work / "out", Files(weight_files(work / "split")), {}, shard_bytes=40 * 2**20)
    ),
}
model = net("meta")
peaks["load shards without memory"] = peak(lambda: load_weights(model, work / "split"))
folder.cleanup()
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory as Linux tells it")
def test_peak_memory_of_264_megabytes_of_weights_in_shards_of_33() -> None:
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    peaks, slack = json.loads(done.stdout), 16
    assert peaks["load one file"] < 1.1 * 264, "the file is mapped, nothing is copied beside the model"
    assert peaks["load shards"] < 33 + slack, "one shard is mapped at a time"
    assert peaks["load shards without memory"] < 264 + 33 + slack, "the model's own memory, and one shard"
    assert peaks["convert"] < 33 + 33 + slack, "one shard is read, one is written"


def test_a_backbone_comes_back_with_its_configuration(tiny_backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path / "b", tiny_backbone, {"stage": "test"})
    loaded = load_backbone(tmp_path / "b", torch.bfloat16)
    assert loaded.config == tiny_backbone.config
    for name, value in tiny_backbone.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.bfloat16()), name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config: config.pop("levels"), "levels"),
        (lambda config: config.pop("shift"), "shift"),
        (lambda config: config["architecture"].update(dims=3), "architecture.dims: unknown key, did you mean 'dim'?"),
        (lambda config: config["history"].update(window="long"), "history.window: 'long'"),
    ],
)
def test_a_configuration_that_does_not_fit_names_the_key(
    tiny_backbone: Backbone, tmp_path: Path, change: Callable[[dict[str, object]], None], complaint: str
) -> None:
    save_backbone(tmp_path / "b", tiny_backbone, {})
    content = json.loads((tmp_path / "b" / CONFIG).read_text())
    change(content["config"])
    (tmp_path / "b" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_backbone(tmp_path / "b")
    assert complaint in str(caught.value)


def test_a_preset_s_random_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    after = torch.randn(1)
    torch.manual_seed(1)
    one, same, other = (new_backbone("wan-doom", seed).model.blocks[0].ffn[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.randn(1), after), "nobody else's random numbers change"


def test_an_autoencoder_comes_back_ready_for_inference(tiny_autoencoder: Autoencoder, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "a", tiny_autoencoder)
    loaded = load_autoencoder(tmp_path / "a")
    assert loaded.config == tiny_autoencoder.config
    assert not loaded.training
    for name, value in tiny_autoencoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name


def test_a_world_comes_back_whole(tiny_world: Path, tiny_backbone: Backbone) -> None:
    world = load_world(tiny_world, torch.float32)
    assert (world.card.name, world.card.height, world.card.width, world.card.fps) == ("tiny", 32, 48, 17.5)
    assert world.card.speeds == Speeds(move=4.0, turn=70.0)
    assert world.backbone.config == tiny_backbone.config
    assert list(world.starts) == ["hall", "yard"]
    assert all(picture.shape == (32, 48, 3) and picture.dtype == np.uint8 for picture in world.starts.values())
    parameters = [*world.backbone.model.parameters(), *world.autoencoder.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)


def test_a_world_is_loaded_onto_the_device_asked_for(tiny_world: Path) -> None:
    world = load_world(tiny_world, device="meta")
    tensors = [*world.backbone.model.state_dict().values(), *world.autoencoder.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_world_replaces_an_old_one_whole(tiny_world: Path, tmp_path: Path) -> None:
    card = dataclasses.replace(load_world(tiny_world).card, name="second")
    save_world(tiny_world, card, tmp_path / "parts/backbone", tmp_path / "parts/autoencoder", {})
    world = load_world(tiny_world)
    assert world.card == card
    assert not world.starts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "tiny-world"]


def test_folders_that_are_no_world_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a world model \(it has no world\.json\)"):
        load_world(tmp_path)
    (tiny_world / "world.json").write_text('{"name": "ti')
    with pytest.raises(CheckpointError, match=r"world\.json"):
        load_world(tiny_world)
