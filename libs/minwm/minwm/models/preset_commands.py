"""The commands `minwm models …`: which backbones there are, and what each takes to run."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from minwm.errors import ConfigError
from minwm.models.commands import Precision

if TYPE_CHECKING:
    import torch

    from minwm.models.cache import CacheGeometry
    from minwm.models.presets import WorldConfig

_ABOUT = {  # short: the table of presets fits into 80 columns
    "wan-doom": "real time on two CPU cores",
    "wan2.1-t2v-1.3b": "Wan 2.1, as released",
    "wan2.1-t2v-14b": "Wan 2.1, the large one",
    "minwm-wan2.1-1.3b": "minWM's world model on Wan 2.1",
    "hunyuanvideo-1.5-8b": "HunyuanVideo 1.5, as released",
    "minwm-hunyuanvideo-1.5-8b": "minWM's on HunyuanVideo 1.5",
    "minwm-hunyuanvideo-1.5-8b-action": "minWM's, steered by actions too",
    "hy-worldplay-8b": "HY-WorldPlay, on the same",
}


def register(app: typer.Typer) -> None:
    """Add `models` to the command line."""
    models = typer.Typer(no_args_is_help=True, help="Which backbones there are, and what each takes to run.")
    models.command(name="list")(list_presets)
    models.command(name="describe")(describe)
    app.add_typer(models, name="models")


def list_presets() -> None:
    """List the presets: size, and what steers them beside the prompt."""
    import torch
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from minwm.models.costs import parameters
    from minwm.models.presets import preset, preset_names

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("preset", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("bfloat16", justify="right")
    table.add_column("conditions")
    for name in preset_names():
        architecture = preset(name).architecture
        count = parameters(architecture)
        weights = decimal(count * torch.bfloat16.itemsize)
        table.add_row(f"{name}\n  {_ABOUT[name]}", _count(count), weights, "\n".join(architecture.conditions) or "none")
    Console(highlight=False).print(table)


def describe(
    name: Annotated[str, typer.Argument(metavar="PRESET", help="One of `minwm models list`.")],
    height: Annotated[int | None, typer.Option(help="Of the picture, in pixels; the preset's if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="The same.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 4,
    window: Annotated[int | None, typer.Option(help="Latent frames attended to; the preset's if not given.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Of weights and caches.")] = Precision.bfloat16,
    tflops: Annotated[float | None, typer.Option(help="What a device sustains; tells how fast it runs there.")] = None,
) -> None:
    """Print what a preset takes: memory of the weights and of every session, FLOPs of a chunk."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from minwm.models.costs import latent_size, picture_size
    from minwm.models.presets import preset

    if tflops is not None and not 0 < tflops < math.inf:
        raise ConfigError(f"--tflops={tflops:g}: expected a positive number")
    config = preset(name)
    if window is not None:
        config = replace(config, history=replace(config.history, window=window))
    height = picture_size(name)[0] if height is None else height
    width = picture_size(name)[1] if width is None else width
    rows, columns = latent_size(config.architecture, height, width)
    cache = config.architecture.cache_geometry(rows, columns, config.history)

    table = Table("figure", "value", title=f"{name}, {height}×{width} pixels, {dtype.value}", min_width=60)
    table.add_row("what it is", _ABOUT[name])
    table.add_row("conditions", ", ".join(config.architecture.conditions) or "none")
    for row in _memory(config, cache, getattr(torch, dtype.value)):
        table.add_row(*row)
    table.add_section()
    for row in _compute(config, cache.tokens_per_frame, steps, tflops):
        table.add_row(*row)
    if getattr(config.architecture, "text_timestep", None) == "frames":
        table.caption = "It can't stream as it is; this is what it takes once trained to (text_timestep: zero)."
    Console(highlight=False).print(table)


def _memory(config: "WorldConfig", cache: "CacheGeometry", dtype: "torch.dtype") -> Iterator[tuple[str, str]]:
    from rich.filesize import decimal

    from minwm.models.costs import parameters, prompt_bytes

    count = parameters(config.architecture)
    yield "parameters", _count(count)
    yield "weights", decimal(count * dtype.itemsize)
    yield "window", f"{config.history.window} latent frames of {cache.tokens_per_frame:,} tokens"
    yield "a session's key/value cache", decimal(cache.bytes(dtype))
    yield "a session's prompt", decimal(prompt_bytes(config.architecture, dtype))


def _compute(config: "WorldConfig", tokens: int, steps: int, tflops: float | None) -> Iterator[tuple[str, str]]:
    from minwm.models.costs import Pass, chunk_flops, forward_flops
    from minwm.models.layout import FRAMES_PER_LATENT

    architecture, history = config.architecture, config.history
    frames = FRAMES_PER_LATENT * history.chunk
    forward = forward_flops(architecture, Pass.cached(history, tokens))
    flops = chunk_flops(architecture, history, tokens, steps)
    yield "a chunk", f"{history.chunk} latent frames, {frames} frames"
    yield "a forward, full window", _flop(forward.total)
    for part, share in asdict(forward).items():
        yield f"  {part}", f"{share / forward.total:.1%}"
    yield f"a chunk, {steps} + 1 forwards", _flop(flops)
    if tflops is not None:
        seconds = flops / (tflops * 1e12)
        yield f"at {tflops:g} TFLOP/s", f"{seconds:.3g} s a chunk, {frames / seconds:.3g} frames/s"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _flop(flops: int) -> str:
    return f"{flops / 1e9:,.1f} GFLOP" if flops < 1e12 else f"{flops / 1e12:,.1f} TFLOP"
