"""How fast the transformers run, and how near that is to what the machine can do.

    python benchmarks/models.py --preset wan-doom --device cpu --out build/models.json

Times one forward of each preset, with random weights, in its three contexts: bidirectional over a window of frames,
teacher-forced over as many, and a chunk that sees a full window of the cache. Its FLOP/s (minwm.models.costs) stand
beside the machine's fastest matrix product in the same precision; on a CPU also beside the floor, the forward's own
matrix products and attention calls alone. What is compared is timed in turn and figures are medians, so that whatever
else the machine does weighs on both sides alike.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minwm.models.backbones import new_model
from minwm.models.cache import KVCache
from minwm.models.conditions import Conditions
from minwm.models.context import Context, Full, teacher_forcing
from minwm.models.costs import Pass, Sizes, forward_flops, latent_size, parameters, picture_size, prompt_bytes
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.presets import WorldConfig, preset
from minwm.models.prope import Cameras
from minwm.models.text import Embedded
from minwm.models.transformer import Prompt, Transformer
from minwm.models.wan import WanConfig
from minwm.precision import native_dtype

MEMORY_SHARE = 0.7  # of the machine's, for weights and cache; the rest is for activations
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
CONVOLUTIONS = {F.conv2d, F.conv3d}

Run = Callable[[], object]


class Device(StrEnum):
    """Where it runs."""

    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Of weights, caches and activations."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(frozen=True)
class Case:
    """One kind of pass of one preset, ready to run."""

    name: str
    shape: Pass
    run: Run


def main(
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Repeatable; wan-doom if not given.")] = None,
    device: Annotated[Device, typer.Option(help="Where it runs.")] = Device.cpu,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of weights, caches and activations; the device's own if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of the picture; the preset's if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the picture; the preset's if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of every forward.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
) -> None:
    """Time the transformers, and compare them with the machine's own matrix products."""
    precision, figures = precision_of(dtype, device), []
    with torch.inference_mode():
        peak = matrix_peak(device, precision)
        for name in presets or ["wan-doom"]:
            config, usual = preset(name), picture_size(name)
            size = latent_size(config.architecture, height or usual[0], width or usual[1])
            try:
                require_memory(config, size, device, precision)
                for case in cases(config, size, device, precision):
                    row = measure(case, device, repeats)
                    flops = forward_flops(config.architecture, case.shape).total
                    achieved = flops / row["seconds"]["forward"]
                    row |= {"flops": flops, "flops_per_second": achieved, "share_of_peak": achieved / peak}
                    figures.append({"preset": name, "context": case.name, **asdict(case.shape), **row})
            except torch.OutOfMemoryError as error:
                figures.append({"preset": name, "skipped": str(error).partition("\n")[0]})
    report = {
        "machine": machine(device),
        "dtype": str(precision).removeprefix("torch."),
        "repeats": repeats,
        "matrix_peak": peak,
    }
    write(out, {**report, "figures": figures})
    show(report, figures)


def precision_of(asked: Precision | None, device: Device) -> torch.dtype:
    """What was asked for, or the device's own."""
    return native_dtype(device.value) if asked is None else getattr(torch, asked.value)


def write(out: Path | None, report: Mapping[str, Any]) -> None:
    """The report as JSON, where one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def require_memory(
    config: WorldConfig, size: tuple[int, int], device: Device, dtype: torch.dtype, streams: int = 1
) -> None:
    """Raise torch.OutOfMemoryError for a preset whose weights and caches leave no room for activations."""
    architecture = config.architecture
    stream = architecture.cache_geometry(*size, config.history).bytes(dtype) + prompt_bytes(architecture, dtype)
    needed = parameters(architecture) * dtype.itemsize + streams * stream
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.mem_get_info()[1] if device is Device.cuda else pages
    if needed > MEMORY_SHARE * memory:
        raise torch.OutOfMemoryError(f"takes {decimal(needed)} beside activations, the machine has {decimal(memory)}")


def cases(config: WorldConfig, size: tuple[int, int], device: Device, dtype: torch.dtype) -> Iterator[Case]:
    """The passes that a preset can do."""
    architecture, history = config.architecture, config.history
    model = random_model(architecture, device, dtype)
    geometry = architecture.cache_geometry(*size, history)
    tokens, window = geometry.tokens_per_frame, history.window

    def case(name: str, shape: Pass, context: Context, prompt: Prompt) -> Case:
        latents = torch.randn(1, shape.frames, architecture.channels, *size, device=device.value)
        timesteps = 1000 * torch.rand(1, shape.frames, device=device.value)
        conditions = random_conditions(shape.frames, device)
        return Case(name, shape, lambda: model(latents, timesteps, prompt, context, conditions))

    text = longest_prompt(architecture, device)
    yield case("bidirectional", Pass.full(window, tokens), Full(window), model.prompt(text, bidirectional=True))
    if getattr(architecture, "text_timestep", "zero") == "frames":
        return  # a model that is bidirectional only
    prompt, clip = model.prompt(text), window - window % history.chunk
    yield case("teacher-forced", Pass.teacher_forced(clip, tokens, history), teacher_forcing(clip, history), prompt)
    cache = KVCache(geometry, 1, dtype, device.value)
    for start in range(0, geometry.frames, history.chunk):
        last = case("cached", Pass.cached(history, tokens), cache.context(start, history.chunk), prompt)
        last.run()
    yield last


def random_model(architecture: Sizes, device: Device, dtype: torch.dtype) -> Transformer:
    """The transformer, its weights random and never in another precision or place."""
    with torch.device("meta"):
        model = new_model(architecture)
    model = model.to(dtype).to_empty(device=device.value).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def random_conditions(frames: int, device: Device) -> Conditions:
    """A camera that moves ahead, and an action for every frame."""
    viewmats = torch.eye(4).repeat(1, frames, 1, 1)
    viewmats[0, :, 2, 3] = -0.2 * torch.arange(frames)
    cameras = Cameras.track(viewmats, torch.tensor([[0.5, 0.9, 0.5, 0.5]]))
    return Conditions(cameras, torch.randint(0, 81, (1, frames))).to(device.value)


def longest_prompt(architecture: Sizes, device: Device, streams: int = 1) -> Any:
    """What `prompt` takes, of as many tokens as the model takes."""

    def embedded(length: int, width: int) -> Embedded:
        return Embedded(
            torch.randn(streams, length, width, device=device.value),
            torch.ones(streams, length, dtype=torch.bool, device=device.value),
        )

    if not isinstance(architecture, WanConfig):
        return HunyuanText(
            language=embedded(architecture.text_length, architecture.text_dim),
            glyphs=embedded(architecture.glyph_length, architecture.glyph_dim),
            vision=embedded(architecture.vision_length, architecture.vision_dim),
        )
    if architecture.byte_text:
        return torch.randint(1, 257, (streams, architecture.text_length), device=device.value)
    return embedded(architecture.text_length, architecture.text_dim)


class _Layout(NamedTuple):
    """Of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self) -> Tensor:
        """One of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).normal_()


class Recorder(TorchFunctionMode):
    """Keeps every matrix product, convolution and attention call that is made while it is active.

    Of the activations that a call is given first it keeps the layout alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], _Layout, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the call, and make it."""
        if func in PRODUCTS or func in CONVOLUTIONS or func is F.scaled_dot_product_attention:
            first, *others = args
            layout = _Layout(first.shape, first.stride(), first.dtype, first.device)
            self.calls.append((func, layout, tuple(others), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def replay(self, *, small: bool) -> Run:
        """Makes the same calls again, on the weights, keys and values that they were made on.

        The activations that a call was given first are replaced by random numbers of the same layout, one tensor for
        all calls that agree in it: so they lie in the processor's caches, as the pass finds its own.
        small: also products with the 4 × 4 matrices of cameras, which are many but hardly work
        """
        stand_ins: dict[_Layout, Tensor] = {}
        calls = []
        for func, layout, others, kwargs in self.calls:
            if func in PRODUCTS and min(others[0].shape[-2:]) <= 4 and not small:
                continue
            if layout not in stand_ins:
                stand_ins[layout] = layout.random()
            calls.append((func, (stand_ins[layout], *others), kwargs))

        def run() -> None:
            for func, args, kwargs in calls:
                func(*args, **kwargs)

        return run


def measure(case: Case, device: Device, repeats: int) -> dict[str, Any]:
    """Median seconds of the forward and, on a CPU, of its floors, and how many times those the forward takes."""
    runs = {"forward": case.run}
    if device is Device.cpu:
        with Recorder() as recorder:
            case.run()
        runs |= {"floor": recorder.replay(small=False), "floor_with_camera_maps": recorder.replay(small=True)}
    seconds = timed_in_turn(runs, device, repeats)
    floors = {name: seconds["forward"] / spent for name, spent in seconds.items() if name != "forward"}
    return {"seconds": seconds, "forward_over": floors}


def timed_in_turn(
    runs: Mapping[str, Run], device: Device, repeats: int, of: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Seconds of each, the median or another figure `of` its rounds in turn."""
    return {name: of(times) for name, times in in_turn(runs, device, repeats).items()}


def in_turn(runs: Mapping[str, Run], device: Device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each in every one of the rounds, in which all of them are timed once; the first, unnoted, warms up."""
    for run in runs.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            settle(device)
            started = time.perf_counter()
            run()
            settle(device)
            spent[name].append(time.perf_counter() - started)
    return spent


def settle(device: Device) -> None:
    """Wait for what is under way on the device."""
    if device is Device.cuda:
        torch.cuda.synchronize()


def matrix_peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product, at its fastest."""
    sides = (1024, 2048) if device is Device.cpu else (4096, 8192)
    factors = [torch.randn(2, side, side, device=device.value).to(dtype).unbind() for side in sides]
    runs = {str(a.shape[0]): lambda a=a, b=b: a @ b for a, b in factors}
    return max(2 * int(side) ** 3 / seconds for side, seconds in timed_in_turn(runs, device, 10, of=min).items())


def machine(device: Device) -> dict[str, Any]:
    """What it was measured on."""
    path = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in path.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    name = torch.cuda.get_device_name() if device is Device.cuda else cpu
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def show(report: dict[str, Any], figures: list[dict[str, Any]]) -> None:
    """Print the figures."""
    title = (
        f"{report['machine']['device']}, {report['dtype']}: products reach {report['matrix_peak'] / 1e9:,.0f} GFLOP/s"
    )
    table = Table("preset", "context", "forward", "GFLOP/s", "of that", "over floor", "with camera maps", title=title)
    for row in figures:
        if "skipped" in row:
            table.add_row(row["preset"], "skipped: " + row["skipped"])
            continue
        floors = (f"{ratio:.2f}" for ratio in row["forward_over"].values())
        milliseconds = f"{1e3 * row['seconds']['forward']:.2f} ms"
        rate, share = f"{row['flops_per_second'] / 1e9:,.0f}", f"{row['share_of_peak']:.0%}"
        table.add_row(row["preset"], row["context"], milliseconds, rate, share, *floors)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
