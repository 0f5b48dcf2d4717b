"""Sequence parallelism: two processes that split the frames compute what one does, gradients included.

The file is also the script that the two processes run: they have the same samples and the same noise, because
draws are keyed by sample and a sequence group has one share of the batch.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minwm.data.clips import Clip
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, load_backbone, save_backbone
from minwm.models.context import Full
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import WindowConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig, make_engine
from minwm.training.parallel import ParallelConfig, Processes, join
from minwm.training.sequence import split_sequence
from minwm.training.stage import Stage

pytestmark = pytest.mark.integration

WINDOW = WindowConfig(frames=4)
BACKBONES: dict[str, dict[str, Any]] = {
    "wan": {"conditions": ("camera_prope", "action_timestep", "camera_attention", "camera_plucker")},
    "hunyuan": {"kind": "hunyuan"},
    "hunyuan-compat": {"kind": "hunyuan", "prope_history": "compat"},
}
STAGES: dict[str, Callable[[Backbone, Backbone], Stage]] = {
    "bidirectional": lambda b, _: Bidirectional(BidirectionalConfig(window=WINDOW), b),
    "autoregressive": lambda b, _: Autoregressive(AutoregressiveConfig(window=WINDOW), b),
    "consistency": lambda b, _: Consistency(ConsistencyConfig(window=WINDOW, guidance=2.0), b),
    "dmd": lambda b, score: DMD(DMDConfig(window=WINDOW, score=Path("unused"), steps=(2,), guidance=2.0), b, score),
}
ALL = [(backbone, stage) for backbone in BACKBONES for stage in STAGES]
"""Among them every context: full, masked, cached; with and without a text stream that sees the frames."""
QUICK = ("wan", "autoregressive"), ("wan", "dmd")
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]


def encode(texts: dict[int, Any], prompts: list[str]) -> Any:
    return texts[len(prompts)]


def trained(folder: Path, backbone: str, stage: str, processes: Processes) -> dict[str, Any]:
    """A loss of every network, the norm of its gradient and its gradient, as the first moment of a step keeps it."""
    texts = torch.load(folder / f"{backbone}.text", weights_only=False)
    models = [load_backbone(folder / backbone) for _ in range(2)]
    if processes.sequence_group is not None:
        for model in models:
            split_sequence(model.model, processes.sequence_group)
    made = STAGES[stage](*(replace(model, encoder=partial(encode, texts)) for model in models))
    config = OptimizerConfig(clip_norm=1e6, betas=(0.0, 0.9))  # the first moment is the gradient
    engines = {name: make_engine("torch", net, config, processes=processes) for name, net in made.networks.items()}
    found: dict[str, Any] = {}
    for turn, engine in engines.items():
        numbers = processes.share(range(2))
        draw = Draw(0, 0, numbers)
        clips = pickle.loads((folder / "clips").read_bytes())
        batch = made.prepare([clips[n] for n in numbers], draw)
        loss, _ = made.loss(turn, batch, draw)
        engine.backward(loss)
        norm = engine.step(1e-3)
        seen = {"latents": batch.latents, "noise": draw.normal("noise", (3,))}
        found[turn] = {"loss": loss.detach(), "norm": norm, "gradient": engine.state_dict()["exp_avg"], "seen": seen}
    return found


def main(folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    processes = join(ParallelConfig(sequence=2))
    cases = pickle.loads((folder / "cases").read_bytes())
    found: dict[str, Any] = {f"{b}-{s}": trained(folder, b, s, processes) for b, s in cases}
    assert processes.sequence_group is not None
    model = load_backbone(folder / "wan").model
    split_sequence(model, processes.sequence_group)
    with pytest.raises(ConfigError) as refused:
        latents = torch.zeros(1, 3, 4, 4, 6)
        model(latents, torch.zeros(1, 3), model.prompt(torch.ones(1, 4, dtype=torch.int64)), Full(3))
    found["frames"] = str(refused.value)
    torch.save(found, folder / f"found-{processes.rank}.pt")
    processes.close()


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    launch: Callable[[Path, Path], list[dict[str, Any]]],
    new_backbone: Callable[..., Backbone],
    new_text: Callable[..., Any],
    new_clips: Callable[[int, int], list[Clip]],
    selected: Callable[[str, Sequence[str]], list[tuple[Any, ...]]],
) -> tuple[Path, list[dict[str, Any]]]:
    """Of the cases that tests were selected for."""
    folder = tmp_path_factory.mktemp("sequence")
    for name, changes in BACKBONES.items():
        backbone = new_backbone(**changes)
        save_backbone(folder / name, backbone, {})
        texts = {batch: new_text(backbone.config.architecture, batch) for batch in (1, 2)}
        torch.save(texts, folder / f"{name}.text")
    (folder / "clips").write_bytes(pickle.dumps(new_clips(2, 6)))
    (folder / "cases").write_bytes(pickle.dumps(selected(__file__, ("backbone", "stage")) or list(QUICK)))
    return folder, launch(Path(__file__), folder)


@pytest.mark.parametrize(("backbone", "stage"), CASES)
def test_two_processes_that_split_the_frames_compute_losses_and_gradients_of_one(
    outcome: tuple[Path, list[dict[str, Any]]], backbone: str, stage: str
) -> None:
    folder, ranks = outcome
    alone = trained(folder, backbone, stage, Processes())
    for found in ranks:
        for turn, expected in alone.items():
            got = found[f"{backbone}-{stage}"][turn]
            torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-5, atol=0)
            assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5)
            for name, gradient in expected["gradient"].items():
                off = float((got["gradient"][name] - gradient).abs().max())
                assert off <= 1e-6 * expected["norm"] + 1e-8, f"{turn} {name}: gradient is off by {off}"


def test_the_processes_of_a_group_see_the_same_samples_and_the_same_noise(
    outcome: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = (found["wan-autoregressive"]["generator"]["seen"] for found in outcome[1])
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frames_that_do_not_divide_are_refused_with_the_numbers(outcome: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in outcome[1]:
        assert found["frames"] == "parallel.sequence=2: expected a divisor of the pass's 3 latent frames"


class Group:
    """As much of a process group as says how large it is."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def test_heads_that_do_not_divide_are_refused_with_the_numbers(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.sequence=3: expected a divisor of the model's 2 heads"):
        split_sequence(tiny_backbone.model, Group(3))  # type: ignore[arg-type]


def test_weights_that_only_the_first_frame_uses_are_refused(new_backbone: Callable[..., Backbone]) -> None:
    model = new_backbone(conditions=("first_image",)).model
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2: expected 1 with the condition first_image"):
        split_sequence(model, Group(2))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
