"""How fast sessions stream, beside the reference's loop, the model without a cache, and the machine's limit.

    python benchmarks/streaming.py --out runs/bench/streaming.json --plots docs/assets
    python benchmarks/streaming.py --preset minwm-wan2.1-1.3b --device cuda --sessions 1

Weights are random. A row per preset, size, fidelity (steps and window) and number of sessions that advance together,
at a full window: a chunk's time and its parts, and, timed in turn with it, the same chunk by minWM's method and without
a cache (benchmarks/baseline_loop.py), and the limit: the matrix products, convolutions and attention calls of its
passes and its decoding alone. Figures are medians over the rounds. Then one session goes on for `--length` frames:
do its chunks take longer as it does? And those of a session that has gone on for 100,000 chunks, by its counters?

A chunk is all that is done between two boundaries, so frames/s can be kept up for ever. action_to_frame_ms is from a
control at the boundary to the chunk's frames; the wait for the boundary comes on top. matmul_share is the limit over
the whole chunk; fused_ms is a chunk whose predecessor's context is written with its own first step, which is then also
its action to frame; denoiser_over_limit and baseline_over_denoiser compare the transformer's passes of a chunk alone.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from baseline_loop import BaselineLoop, decode_clip, whole_window, without_cache
from streaming_length import far_along, over_length
from streaming_report import draw, show
from streaming_sessions import Streams, Workload
from streaming_worlds import Decoder, random_world, usual_sizes, world_config
from torch import Tensor

from minwm.memory import keep_freed_memory
from minwm.models.costs import chunk_flops
from minwm.models.fused import fuse
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Transformer
from minwm.progress import progress_bar
from models import (
    Device,
    Precision,
    Recorder,
    Run,
    in_turn,
    longest_prompt,
    machine,
    matrix_peak,
    precision_of,
    random_conditions,
    require_memory,
    settle,
    write,
)

FAR = 100_000  # chunks


def main(
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Repeatable; wan-doom if not given.")] = None,
    sizes: Annotated[list[str] | None, typer.Option("--size", help="HEIGHTxWIDTH in pixels, repeatable.")] = None,
    fidelities: Annotated[list[str] | None, typer.Option("--fidelity", help="STEPS:WINDOW, repeatable.")] = None,
    sessions: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; 1, 2, 4, 8 if not given.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Latent frames of a chunk; the preset's if not given.")] = None,
    decoder: Annotated[Decoder, typer.Option(help="Of presets whose autoencoder is published.")] = Decoder.tiny,
    device: Annotated[Device, typer.Option(help="Where it runs.")] = Device.cpu,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of weights, caches and activations; the device's own if not given.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the engine's passes.")] = False,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="FP8 products in the engine's blocks.")] = False,
    length: Annotated[int, typer.Option(min=0, help="RGB frames of the long session; 0: none.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=1, max=200, help="Timings of everything.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots as SVG.")] = None,
) -> None:
    """Time streaming sessions, and compare them with slower ways and with the limit."""
    keep_freed_memory()
    precision, figures, curves = precision_of(dtype, device), [], []
    configs = [world_config(name, chunk, fidelities) for name in presets or ["wan-doom"]]
    worlds = [(*config, size) for config in configs for size in sizes or usual_sizes(config[0].preset)]
    counts = sessions or [1, 2, 4, 8]
    rows = sum(len(levels) * len(counts) for _, levels, _ in worlds)
    with torch.inference_mode(), progress_bar("streaming", rows, every=1) as tell:
        peak = matrix_peak(device, precision) if device is Device.cuda else None
        for config, levels, size in worlds:
            world = random_world(config, size, decoder, device, precision)
            for level, count in product(levels, counts):
                figures.append(row(Workload(world, level, count, device, compiled, eight_bit), repeats, peak))
                tell(len(figures), f"{config.preset} {size}, {level.steps}:{level.window}, {count} sessions")
            if length and any("skipped" not in one for one in figures[-len(levels) * len(counts) :]):
                work = Workload(world, levels[0], 1, device, compiled, eight_bit)
                curves.append({**over_length(work, length), **far_along(work, FAR, repeats)})
    report = {
        "machine": machine(device),
        "dtype": str(precision).removeprefix("torch."),
        "repeats": repeats,
        "matrix_peak": peak,
    }
    report |= {"figures": figures, "length": curves}
    write(out, report)
    if plots is not None:
        draw(plots, figures, curves)
    show(report)


def row(work: Workload, repeats: int, peak: float | None) -> dict[str, Any]:
    """The figures of one workload, or why there are none."""
    config, card = work.world.backbone.config, work.world.card
    about = {"preset": config.preset, "height": card.height, "width": card.width, "chunk": work.history.chunk}
    about |= {"steps": work.fidelity.steps, "window": work.fidelity.window, "sessions": work.sessions}
    about |= {"device": machine(work.device)["device"], "compiled": work.compiled}
    about |= {"eight_bit": work.eight_bit}
    dtype = work.noise(1).dtype
    try:  # four caches: the engines', the baseline's, and the one that the limit reads; one more to restore to
        require_memory(replace(config, history=work.history), work.latents, work.device, dtype, 4 * work.sessions + 2)
        return about | measure(work, repeats, peak)
    except torch.OutOfMemoryError as error:
        return about | {"skipped": str(error).partition("\n")[0]}


def measure(work: Workload, repeats: int, peak: float | None) -> dict[str, Any]:
    """Figures of the engine at a full window, and of what is timed in turn with it."""
    streams = Streams(work)
    first = [first_frame(streams, work.device) for _ in range(repeats + 1)][1:]
    fused = Streams(work, fuse=True)
    for each in (streams, fused):
        each.open()
        for _ in range(0, work.history.window + work.history.chunk, work.history.chunk):
            each.advance()
            streams.settle()
    streams.parts.clear()
    runs = {"advance": streams.advance, "context": streams.settle, "fused": fused.advance}
    runs |= {**rivals(work), **limit(work)}
    rounds = in_turn(runs, work.device, repeats)
    denoise, decode = (list(part) for part in zip(*streams.parts[-repeats:], strict=True))
    advance, context = rounds["advance"], rounds["context"]
    rounds |= {
        "denoise": denoise,
        "decode": decode,
        "other": [a - b - c for a, b, c in zip(advance, denoise, decode, strict=True)],
        "chunk": [a + b for a, b in zip(advance, context, strict=True)],
        "denoiser": [a + b for a, b in zip(denoise, context, strict=True)],
        "ttff": first,
    }
    seconds = {name: statistics.median(spent) for name, spent in rounds.items()}
    parts = ("ttff", "chunk", "denoise", "context", "decode", "other")
    return {
        "fps": work.frames / seconds["chunk"],
        **{f"{name}_ms": 1e3 * seconds[name] for name in parts},
        "action_to_frame_ms": 1e3 * seconds["advance"],
        "fused_ms": 1e3 * seconds["fused"],
        **comparisons(work, seconds, peak),
        "bytes_per_session": streams.bytes_per_session,
        **streams.kept(),
        **(eight_bit_error(work) if work.eight_bit else {}),
    }


def eight_bit_error(work: Workload) -> dict[str, float]:
    """How far a velocity is off when products have eight bits, of its size; beside what the precision itself takes."""
    model, history = work.world.backbone.model, work.history
    conditions = random_conditions(history.window, work.device).streams(torch.zeros(work.sessions, dtype=torch.long))
    latents, text = work.noise(history.window), longest_prompt(model.architecture, work.device, work.sessions)
    timesteps = torch.full(latents.shape[:2], 500.0, device=work.device.value)

    def velocity(of: Transformer) -> Tensor:
        return of(latents, timesteps, of.prompt(text), whole_window(history), conditions).float()

    exact, rounded = velocity(model), velocity(fuse(model, eight_bit=True))
    fused = velocity(fuse(model))
    return {
        "eight_bit_error": float((rounded - exact).norm() / exact.norm()),
        "fused_error": float((fused - exact).norm() / exact.norm()),
    }


def comparisons(work: Workload, seconds: Mapping[str, float], peak: float | None) -> dict[str, float]:
    """The engine's seconds beside those of the rest; peak: FLOP/s of the machine's matrix products, if measured."""
    clip = seconds["baseline_decode"] * work.history.chunk / work.history.window
    products = seconds["products"] + seconds["decode_products"]
    figures = {
        "baseline_fps": work.frames / (seconds["baseline"] + clip),
        "no_cache_fps": work.frames / (seconds["no_cache"] + seconds["decode"]),
        "limit_fps": work.frames / products,
        "matmul_share": products / seconds["chunk"],
        "denoiser_over_limit": seconds["denoiser"] / seconds["products"],
        "baseline_over_denoiser": seconds["baseline"] / seconds["denoiser"],
    }
    if peak is not None:
        architecture = work.world.backbone.config.architecture
        tokens = architecture.cache_geometry(*work.latents, work.history).tokens_per_frame
        flops = work.sessions * chunk_flops(architecture, work.history, tokens, work.fidelity.steps)
        figures["denoiser_share_of_peak"] = flops / seconds["denoiser"] / peak
    return figures


def first_frame(streams: Streams, device: Device) -> float:
    """Seconds from opening sessions to their first frames."""
    started = time.perf_counter()
    streams.open()
    streams.advance()
    settle(device)
    return time.perf_counter() - started


def rivals(work: Workload) -> dict[str, Run]:
    """A chunk of all sessions by minWM's method and without a cache, and the decoding of a clip of one window."""
    backbone, history = work.world.backbone, work.history
    model, levels = backbone.model, backbone.config.sampling_levels(work.fidelity.steps)
    prompt = model.prompt(longest_prompt(model.architecture, work.device, work.sessions))
    window = random_conditions(history.window, work.device).streams(torch.zeros(work.sessions, dtype=torch.long))
    last = window.frames(history.window - history.chunk, history.window)
    context, past = whole_window(history), work.noise(history.window - history.chunk)
    clip = work.noise(history.window)
    loop = BaselineLoop(model, history, clip.shape[2:], batch=work.sessions)

    def noise(step: int = 0) -> Tensor:
        return work.noise(history.chunk)

    def baseline() -> None:
        loop.commit(loop.denoise(noise(), prompt, last, levels, noise), prompt, last)

    for _ in range(0, history.window, history.chunk):
        loop.commit(noise(), prompt, last)
    return {
        "baseline": baseline,
        "baseline_decode": lambda: decode_clip(work.world.autoencoder, [clip]),
        "no_cache": lambda: without_cache(model, context, past, noise(), prompt, window, levels, noise),
    }


def limit(work: Workload) -> dict[str, Run]:
    """The matrix products, convolutions and attention calls of a chunk's passes, and of its decoding."""
    model, history, decoder = fuse(work.world.backbone.model), work.history, work.world.autoencoder
    latents = work.noise(history.chunk)
    prompt = model.prompt(longest_prompt(model.architecture, work.device, work.sessions))
    conditions = random_conditions(history.chunk, work.device).streams(torch.zeros(work.sessions, dtype=torch.long))
    rollout = ChunkRollout(model, history, latents.shape[2:], batch=work.sessions)
    for _ in range(0, history.window, history.chunk):
        rollout.commit(latents, prompt, conditions)
    with Recorder() as one_pass:
        rollout.velocity(latents, 1.0, prompt, conditions)
    _, state = decoder.decode(latents)
    with Recorder() as decoding:
        decoder.decode(latents, state)
    replay, passes = one_pass.replay(small=False), work.fidelity.steps + 1

    def products() -> None:
        for _ in range(passes):
            replay()

    return {"products": products, "decode_products": decoding.replay(small=False)}


if __name__ == "__main__":
    typer.run(main)
