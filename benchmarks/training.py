"""How fast the stages train, and how near that is to what the machine can do.

    python benchmarks/training.py --preset wan-doom --device cpu --out build/training.json

Times whole steps on random weights and clips: losses, gradients, AdamW. Their FLOP/s (minwm.training.dry_run, nothing
counted that is computed twice) stand beside the machine's fastest matrix product, which has the precision that they
have; on a CPU also beside the floor, the step's own matrix products and attention alone, forward and backward. What is
compared is timed in turn and figures are medians. DMD is timed at each of its exit steps, its critic five times for
each time of its generator, as it is trained. The stage `ode` makes the autoregressive stage's passes and is not timed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minwm.config import build
from minwm.data.clips import Clip
from minwm.models.backbones import Backbone
from minwm.models.costs import Sizes, latent_size, picture_size
from minwm.models.presets import WorldConfig, preset
from minwm.models.transformer import Transformer
from minwm.precision import native_dtype
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.dry_run import plan
from minwm.training.recipe import Recipe
from minwm.training.stage import Stage
from models import (
    PRODUCTS,
    Device,
    Run,
    longest_prompt,
    machine,
    matrix_peak,
    random_model,
    timed_in_turn,
    write,
)

STAGES = ("bidirectional", "autoregressive", "consistency", "dmd")
STEPS, CRITIC_RATIO = 4, 5  # of DMD: sampling steps, and turns of the critic for one of the generator


def main(
    name: Annotated[str, typer.Option("--preset", help="Of the backbone.")] = "wan-doom",
    stages: Annotated[list[str] | None, typer.Option("--stage", help="Repeatable; all if not given.")] = None,
    device: Annotated[Device, typer.Option(help="Where it runs.")] = Device.cpu,
    frames: Annotated[int, typer.Option(help="Latent frames of a clip.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 2,
    height: Annotated[int | None, typer.Option(help="Of the picture; the preset's if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the picture; the preset's if not given.")] = None,
    checkpointed: Annotated[bool, typer.Option("--checkpoint", help="Checkpoint activations.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of every step.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
) -> None:
    """Time training steps, and compare them with the machine's own matrix products."""
    world, usual = preset(name), picture_size(name)
    size = latent_size(world.architecture, height or usual[0], width or usual[1])
    peak, figures = matrix_peak(device, native_dtype(device.value)), []
    for stage in stages or STAGES:
        made = recipe(stage, name, frames, size, batch)
        row, planned = measure(made, world, device, repeats, checkpointed, compiled), plan(made)
        seconds = row["seconds"]["step"]
        row |= {"tokens_per_second": batch * frames * planned.tokens / seconds, "flops": planned.flops}
        row |= {"flops_per_second": planned.flops / seconds, "share_of_peak": planned.flops / seconds / peak}
        figures.append({"stage": stage, **row})
    report = {"machine": machine(device), "preset": name, "frames": frames, "latents": size, "batch": batch}
    report |= {"checkpointed": checkpointed, "compiled": compiled, "repeats": repeats, "matrix_peak": peak}
    write(out, {**report, "figures": figures})
    show(report, figures)


def recipe(stage: str, name: str, frames: int, size: tuple[int, int], batch: int) -> Recipe:
    """What is timed, as one would write it down to train it."""
    method: dict[str, Any] = {"window": {"frames": frames, "crop": list(size), "prompt_dropout": 0.0}}
    if stage == "consistency":
        method |= {"guidance": 3.0}
    if stage == "dmd":
        method |= {"score": "same", "steps": [STEPS], "critic_ratio": CRITIC_RATIO, "guidance": 4.0}
    values = {"stage": stage, "data": "none", "backbone": f"preset:{name}", "method": method}
    return build(Recipe, {**values, "run": {"steps": 1, "batch_size": batch}, "optimizers": {}})


def measure(
    made: Recipe, world: WorldConfig, device: Device, repeats: int, checkpointed: bool, compiled: bool
) -> dict[str, Any]:
    """Median seconds of a mean step and, on a CPU, of its floor, and how many times that the step takes."""
    stage, numbers = new_stage(made, world, device), range(made.run.batch_size)
    for network in stage.networks.values():
        assert isinstance(network, Transformer)
        network.checkpoint_activations = checkpointed
        for block in network.children() if compiled else ():
            if isinstance(block, nn.ModuleList):
                for layer in block:
                    layer.compile(dynamic=False)
    clips = [clip(world.architecture, made, number) for number in numbers]
    batch = stage.prepare(clips, Draw(0, 0, numbers, device.value))
    seconds: Counter[str] = Counter()
    for turn, share in turns(made.stage).items():
        draws = [Draw(0, step, numbers, device.value) for step in steps(made.stage, turn)]
        runs = {"step": updates(stage, turn, batch, draws, device)}
        if device is Device.cpu:
            with Products() as products:
                runs["step"]()
            runs["floor"] = products.again
        for name, spent in timed_in_turn(runs, device, repeats).items():
            seconds[name] += share * spent / len(draws)
    over = {"floor": seconds["step"] / seconds["floor"]} if "floor" in seconds else {}
    return {"seconds": dict(seconds), "step_over": over}


def turns(stage: str) -> Mapping[str, float]:
    """The networks that a stage trains, and how often each has its turn in a step."""
    return {"generator": 1 / CRITIC_RATIO, "critic": 1} if stage == "dmd" else {"generator": 1}


def steps(stage: str, turn: str) -> Sequence[int]:
    """Numbers of steps that together are a mean one: of DMD, one with each exit."""
    if stage != "dmd":
        return [0]
    exits = {Draw(0, step, ()).shared_integer(f"{turn} exit", STEPS): step for step in range(100)}
    return list(exits.values())


def updates(stage: Stage, turn: str, batch: Any, draws: Sequence[Draw], device: Device) -> Run:
    """Makes an update of a network for each of the draws."""
    network = stage.networks[turn]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, fused=True)
    quick = native_dtype(device.value) is torch.bfloat16

    def run() -> None:
        for draw in draws:
            with torch.autocast(device.value, torch.bfloat16, enabled=quick):
                loss, _ = stage.loss(turn, batch, draw)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


class Products(TorchFunctionMode):
    """Notes every matrix product and attention call made while it is active: its shapes, and where gradient flows.

    Products with the 4 × 4 matrices of cameras are left out: they are many, but hardly work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._tensors: dict[Any, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the call, and make it."""
        kwargs = dict(kwargs or {})
        product = func in PRODUCTS and min(args[1].shape[-2:]) > 4
        if product or func is F.scaled_dot_product_attention:
            self._calls.append((func, tuple(map(self._alike, args)), {k: self._alike(v) for k, v in kwargs.items()}))
        return func(*args, **kwargs)

    def _alike(self, value: Any) -> Any:
        """A random tensor of the same layout, one for all that agree in it, in the precision that autocast computes."""
        if not isinstance(value, Tensor):
            return value
        graded = value.requires_grad and torch.is_grad_enabled()
        dtype = torch.bfloat16 if value.is_floating_point() and torch.is_autocast_enabled("cpu") else value.dtype
        key = (value.shape, value.stride(), dtype, graded)
        if key not in self._tensors:
            made = torch.empty_strided(value.shape, value.stride(), dtype=dtype)
            made = made.normal_() if made.is_floating_point() else made.fill_(1)
            self._tensors[key] = made.requires_grad_(graded)
        return self._tensors[key]

    def again(self) -> None:
        """Make the calls again, each with its backward where it had one."""
        for func, args, kwargs in self._calls:
            out = func(*args, **kwargs)
            wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
            if wanted:
                torch.autograd.grad(out, wanted, out.detach())


def new_stage(made: Recipe, world: WorldConfig, device: Device) -> Stage:
    """The stage of a recipe on random weights."""

    def backbone() -> Backbone:
        model = random_model(world.architecture, device, torch.float32).train().requires_grad_(True)
        return Backbone(model, world, lambda prompts: longest_prompt(world.architecture, device, len(prompts)))

    if made.stage == "dmd":
        return DMD(build(DMDConfig, made.method), backbone(), backbone())
    if made.stage == "bidirectional":
        return Bidirectional(build(BidirectionalConfig, made.method), backbone())
    if made.stage == "autoregressive":
        return Autoregressive(build(AutoregressiveConfig, made.method), backbone())
    return Consistency(build(ConsistencyConfig, made.method), backbone())


def clip(architecture: Sizes, made: Recipe, number: int) -> Clip:
    """Random latents of a camera that moves ahead."""
    window, random = made.method["window"], np.random.default_rng(number)
    frames, size = window["frames"], window["crop"]
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 2, 3] = 0.2 * np.arange(frames)
    return Clip(
        name=str(number),
        episode="random",
        split="train",
        caption="",
        latents=random.standard_normal((frames, architecture.channels, *size)).astype(np.float16),
        poses=poses,
        intrinsics=np.array([0.5, 0.9, 0.5, 0.5], np.float32),
        actions=random.integers(0, 81, frames),
        frames=b"",
        notes={},
    )


def show(report: dict[str, Any], figures: list[dict[str, Any]]) -> None:
    """Print the figures."""
    title = (
        f"{report['preset']}, {report['machine']['device']}, {report['machine']['threads']} threads: "
        f"products reach {report['matrix_peak'] / 1e9:,.0f} GFLOP/s"
    )
    table = Table("stage", "step", "tokens/s", "GFLOP/s", "of that", "over floor", title=title)
    for row in figures:
        over = (f"{ratio:.2f}" for ratio in row["step_over"].values())
        rates = (f"{row['tokens_per_second']:,.0f}", f"{row['flops_per_second'] / 1e9:,.0f}")
        table.add_row(row["stage"], f"{row['seconds']['step']:.3f} s", *rates, f"{row['share_of_peak']:.1%}", *over)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
