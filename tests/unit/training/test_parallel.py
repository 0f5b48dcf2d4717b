"""Processes that train together: shares of a batch, and DeepSpeed's ZeRO 0 to 3 on two of them equal one process.

The file is also the script that the two processes run.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, load_backbone, save_backbone
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.average import gathered
from minwm.training.batch import WindowConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.engine import Engine, EngineName, OptimizerConfig, make_engine
from minwm.training.parallel import ParallelConfig, Processes, join, part
from minwm.training.stage import Stage

pytestmark = pytest.mark.integration

WINDOW = WindowConfig(frames=4)
OPTIMIZER = OptimizerConfig(clip_norm=0.05, weight_decay=0.1)
RUNS: list[tuple[str, EngineName, int]] = [
    ("autoregressive", "torch", 0),
    *(("autoregressive", "deepspeed", zero) for zero in range(4)),
    ("dmd", "deepspeed", 3),
]
BATCH, HALF, WHOLE = 4, 2, 3  # samples a step; steps to the checkpoint, and in all
QUICK = ("autoregressive", "deepspeed", 2)  # six engines in each of three processes take a minute and a half
CASES = [run if run == QUICK else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS]
# In float32. A step moves weights by 1e-3, also where a gradient is as small as its own rounding (AdamW divides by it).
TOLERANCE = {"networks": 1e-5, "frozen": 1e-5, "engines": 1e-8}


def new_stage(folder: Path, method: str) -> Stage:
    backbone = load_backbone(folder / "backbone")
    if method == "autoregressive":
        return Autoregressive(AutoregressiveConfig(window=WINDOW), backbone)
    config = DMDConfig(window=WINDOW, score=folder / "backbone", steps=(2,), critic_ratio=2)
    stage = DMD(config, backbone, load_backbone(config.score))
    with torch.no_grad():  # a critic that differs from the score already
        for parameter in stage.networks["critic"].parameters():
            parameter.mul_(1.01)
    return stage


def train(
    stage: Stage,
    engines: dict[str, Engine],
    samples: Sequence[Clip],
    steps: range,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    accumulation: int = 1,
) -> list[float]:
    """As the loop does it, in float32; the norms of all gradients."""
    norms = []
    for step in steps:
        numbers = processes.share(range(step * BATCH, (step + 1) * BATCH))
        size = len(numbers) // accumulation
        for turn in stage.turns(step):
            for first in range(0, len(numbers), size):
                chosen = numbers[first : first + size]
                draw = Draw(0, step, chosen)
                batch = stage.prepare([samples[n % len(samples)] for n in chosen], draw)
                loss, _ = stage.loss(turn, batch, draw)
                engines[turn].backward(loss / accumulation)
            norms.append(engines[turn].step(1e-3))
        stage.after_step(step)
    return norms


def kept(stage: Stage, engines: dict[str, Engine]) -> dict[str, Any]:
    """What a checkpoint holds, copied."""
    frozen = {name: {key: v.clone() for key, v in net.state_dict().items()} for name, net in stage.frozen.items()}
    weights = {name: {key: v.clone() for key, v in engine.weights().items()} for name, engine in engines.items()}
    states = {}
    for name, engine in engines.items():
        state = engine.state_dict()
        moments = {m: {key: v.clone() for key, v in state[m].items()} for m in ("exp_avg", "exp_avg_sq")}
        states[name] = {"step": state["step"], **moments}
    return {"networks": weights, "frozen": frozen, "engines": states}


def restored(
    folder: Path, method: str, new_engine: Callable[[nn.Module], Engine], checkpoint: dict[str, Any] | None
) -> tuple[Stage, dict[str, Engine]]:
    stage = new_stage(folder, method)
    if checkpoint is not None:
        for name, network in (*stage.networks.items(), *stage.frozen.items()):
            network.load_state_dict((checkpoint["networks"] | checkpoint["frozen"])[name])
    engines = {name: new_engine(network) for name, network in stage.networks.items()}
    if checkpoint is not None:
        for name, engine in engines.items():
            engine.load_state_dict(checkpoint["engines"][name])
    return stage, engines


def main(folder: Path) -> None:
    """What each of two processes does: every engine up to the checkpoint, and on from one process's checkpoint."""
    import minwm.training.deepspeed_engine as deepspeed_engine

    deepspeed_engine.WHOLE_BELOW = 256  # so that ZeRO-3 has something to share out of a tiny network
    torch.set_num_threads(1)
    processes = join(ParallelConfig())
    samples = pickle.loads((folder / "clips").read_bytes())
    found: dict[str, Any] = {"mean": processes.mean(float(processes.rank)), "place": (processes.rank, processes.world)}
    for method, name, zero in pickle.loads((folder / "runs").read_bytes()):

        def new_engine(network: nn.Module, name: EngineName = name, zero: Any = zero) -> Engine:
            return make_engine(name, network, OPTIMIZER, ParallelConfig(zero=zero), processes)

        stage, engines = restored(folder, method, new_engine, None)
        norms = train(stage, engines, samples, range(HALF), processes, accumulation=2)
        result: dict[str, Any] = {"norms": norms, "half": kept(stage, engines)}
        sizes = [sum(p.numel() for p in network.parameters()) for network in stage.networks.values()]
        with gathered(*stage.networks.values(), *stage.frozen.values()):
            if processes.is_main:  # alone
                stage.export(folder / f"{method}-{name}-{zero}", {})
        processes.barrier()
        checkpoint = torch.load(folder / f"{method}.pt")
        stage, engines = restored(folder, method, new_engine, checkpoint)
        result["norms"] += train(stage, engines, samples, range(HALF, WHOLE), processes)
        found[f"{method}-{name}-{zero}"] = result | {"whole": kept(stage, engines), "sizes": sizes}
    torch.save(found, folder / f"found-{processes.rank}.pt")
    processes.close()


class Alone:
    """The same training by one process without DeepSpeed, with whole batches."""

    def __init__(self, folder: Path, samples: Sequence[Clip], method: str) -> None:
        self.folder, self.samples, self.method = folder, samples, method
        stage, engines = self.restored(None)
        self.norms = train(stage, engines, samples, range(HALF))
        self.half = kept(stage, engines)
        torch.save(self.half, folder / f"{method}.pt")
        self.norms += train(stage, engines, samples, range(HALF, WHOLE))
        self.whole = kept(stage, engines)

    def restored(self, checkpoint: dict[str, Any] | None) -> tuple[Stage, dict[str, Engine]]:
        return restored(self.folder, self.method, lambda net: make_engine("torch", net, OPTIMIZER), checkpoint)

    def resumed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What the second half makes of a checkpoint."""
        stage, engines = self.restored(checkpoint)
        train(stage, engines, self.samples, range(HALF, WHOLE))
        return kept(stage, engines)


@dataclass(frozen=True)
class Outcome:
    folder: Path
    alone: dict[str, Alone]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    new_backbone: Callable[..., Backbone],
    new_clips: Callable[[int, int], list[Clip]],
    launch: Callable[[Path, Path], list[dict[str, Any]]],
    selected: Callable[[str, Sequence[str]], list[tuple[Any, ...]]],
) -> Outcome:
    """Of the runs that tests were selected for."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder, clips = tmp_path_factory.mktemp("two"), new_clips(5, 6)
    save_backbone(folder / "backbone", new_backbone(), {})
    (folder / "clips").write_bytes(pickle.dumps(clips))
    runs = selected(__file__, ("method", "name", "zero")) or RUNS
    (folder / "runs").write_bytes(pickle.dumps(runs))
    alone = {method: Alone(folder, clips, method) for method in dict.fromkeys(method for method, _, _ in runs)}
    return Outcome(folder, alone, launch(Path(__file__), folder))


def require_close(found: Any, expected: Any, where: tuple[str, ...] = ()) -> None:
    """The same tree of tensors, each within the tolerance of its part of a checkpoint."""
    if isinstance(expected, Tensor):
        off = float((found - expected).abs().max())
        assert off <= TOLERANCE[where[0]], f"{' '.join(where)}: is off by {off}"
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            require_close(found[name], value, (*where, name))
    else:
        assert found == expected, where


@pytest.mark.parametrize(("method", "name", "zero"), CASES)
def test_two_processes_with_accumulation_train_as_one_with_whole_batches(
    outcome: Outcome, method: str, name: str, zero: int
) -> None:
    alone = outcome.alone[method]
    for found in outcome.ranks:
        result = found[f"{method}-{name}-{zero}"]
        require_close(result["half"], alone.half)
        assert result["norms"] == pytest.approx(alone.norms, rel=1e-4)
    assert max(alone.norms) > OPTIMIZER.clip_norm, "the test needs clipping"


@pytest.mark.parametrize(("method", "name", "zero"), CASES)
def test_two_processes_go_on_from_one_process_s_checkpoint_as_it_does(
    outcome: Outcome, method: str, name: str, zero: int
) -> None:
    for found in outcome.ranks:
        require_close(found[f"{method}-{name}-{zero}"]["whole"], outcome.alone[method].whole)


@pytest.mark.parametrize(("method", "name", "zero"), CASES)
def test_one_process_goes_on_from_two_processes_checkpoint_as_they_would(
    outcome: Outcome, method: str, name: str, zero: int
) -> None:
    checkpoint = outcome.ranks[0][f"{method}-{name}-{zero}"]["half"]
    require_close(outcome.alone[method].resumed(checkpoint), outcome.alone[method].whole)


@pytest.mark.parametrize(("method", "name", "zero"), CASES)
def test_main_exports_the_trained_model_alone(outcome: Outcome, method: str, name: str, zero: int) -> None:
    exported = load_backbone(outcome.folder / f"{method}-{name}-{zero}").model.state_dict()
    half = outcome.ranks[0][f"{method}-{name}-{zero}"]["half"]
    trained = half["frozen"]["average"] if method == "dmd" else half["networks"]["generator"]
    for key, value in trained.items():
        assert torch.equal(exported[key], value.bfloat16().float()), key


@pytest.mark.slow
def test_zero_3_shares_the_weights_out(outcome: Outcome) -> None:
    whole = sum(value.numel() for value in outcome.alone["dmd"].half["networks"]["critic"].values())
    for found in outcome.ranks:
        assert found["autoregressive-deepspeed-2"]["sizes"] == [whole]
        assert max(found["dmd-deepspeed-3"]["sizes"]) < 0.2 * whole, "between steps only small parameters are whole"


def test_processes_know_their_place_and_take_means(outcome: Outcome) -> None:
    assert [found["place"] for found in outcome.ranks] == [(0, 2), (1, 2)]
    assert [found["mean"] for found in outcome.ranks] == [0.5, 0.5]


@given(sequence=st.integers(1, 4), groups=st.integers(1, 5), each=st.integers(1, 4), first=st.integers(0, 100))
def test_data_ranks_share_a_batch_out_and_a_sequence_group_has_one_share(
    sequence: int, groups: int, each: int, first: int
) -> None:
    numbers = range(first, first + groups * each)
    shares = [
        Processes(rank=rank, world=groups * sequence, sequence=sequence).share(numbers)
        for rank in range(groups * sequence)
    ]
    for rank, share in enumerate(shares):
        assert share == shares[rank - rank % sequence], "of one group"
        assert len(share) == each
    assert [n for share in shares[::sequence] for n in share] == list(numbers)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 6 samples: expected a multiple of the 4 parts of 8 processes"):
        Processes(world=8, sequence=2).share(range(6))


def test_without_a_launcher_a_process_is_alone() -> None:
    processes = join(ParallelConfig())
    assert (processes.rank, processes.world, processes.data_size, processes.is_main) == (0, 1, 1, True)
    assert processes.share(range(3, 6)) == range(3, 6)
    assert processes.mean(0.1) == 0.1
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2: expected a divisor of the 1 processes"):
        join(ParallelConfig(sequence=2))
    with pytest.raises(ConfigError, match=r"parallel\.sequence=0"):
        ParallelConfig(sequence=0)


@given(numel=st.integers(1, 30), count=st.integers(1, 6))
def test_parts_are_equal_and_make_up_the_tensor(numel: int, count: int) -> None:
    tensor = torch.arange(numel) + 1
    parts = [part(tensor, rank, count) for rank in range(count)]
    assert len({len(piece) for piece in parts}) == 1
    joined = torch.cat(parts)
    assert torch.equal(joined[:numel], tensor)
    assert not joined[numel:].any()
    assert len(joined) < numel + count


if __name__ == "__main__":
    main(Path(sys.argv[1]))
