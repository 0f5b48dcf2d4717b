"""The commands `minwm checkpoints …`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from minwm.errors import CheckpointError, ConfigError

SOURCE = Annotated[str, typer.Argument(help="File, folder, or repository on the hub: owner/name or owner/name/folder.")]
DOWNLOAD = Annotated[bool, typer.Option("--download", help="Fetch a repository's weights from the hub.")]


class Precision(StrEnum):
    """Of written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Layout(StrEnum):
    """Other than ours."""

    diffusers = "diffusers"


def register(app: typer.Typer) -> None:
    """Add `checkpoints` to the command line."""
    checkpoints = typer.Typer(no_args_is_help=True, help="Look at published weights, convert them to ours and back.")
    checkpoints.command(name="inspect")(inspect)
    checkpoints.command(name="convert")(convert)
    checkpoints.command(name="verify")(verify)
    app.add_typer(checkpoints, name="checkpoints")


def inspect(source: SOURCE, download: DOWNLOAD = False) -> None:
    """Print what a checkpoint is: format, tensors, digests, and which presets it fits or why not."""
    from dataclasses import asdict

    import yaml

    from minwm.models.conversion import inspect as inspected

    typer.echo(yaml.safe_dump(asdict(inspected(source, download=download)), sort_keys=False, width=1000))


def convert(
    source: SOURCE,
    out: Annotated[Path, typer.Option(help="New folder.")],
    preset: Annotated[str | None, typer.Option(help="Write a backbone folder of this preset.")] = None,
    to: Annotated[Layout | None, typer.Option(help="Write a backbone folder of ours in another layout.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Cast the weights; else they stay as they are.")] = None,
    add_conditions: Annotated[
        bool, typer.Option("--add-conditions", help="Add the preset's branches that a base model lacks.")
    ] = False,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Split the weights over files of this size.")] = 5.0,
    download: DOWNLOAD = False,
) -> None:
    """Convert published weights to a backbone folder (--preset), or one of ours to Diffusers' layout (--to)."""
    if (preset is None) == (to is None):
        raise ConfigError("--preset, --to: expected one of them")
    if to is not None and (add_conditions or download):
        raise ConfigError("--to: takes a folder as it is, expected neither --add-conditions nor --download")
    import torch

    from minwm.models.conversion import convert as converted
    from minwm.models.conversion import export_diffusers
    from minwm.models.presets import preset as named

    precision = None if dtype is None else getattr(torch, dtype.value)
    shard_bytes = int(shard_gb * 10**9)
    if preset is None:
        export_diffusers(Path(source), out, dtype=precision, shard_bytes=shard_bytes)
        typer.echo(f"Diffusers' layout in {out}")
        return
    added = converted(
        source,
        named(preset),
        out,
        dtype=precision,
        add_conditions=add_conditions,
        download=download,
        shard_bytes=shard_bytes,
    )
    typer.echo(f"{preset} in {out}" + (f", {len(added)} tensors of new branches added" if added else ""))


def verify(
    source: SOURCE,
    preset: Annotated[str, typer.Option(help="What the weights are; one without conditions.")],
    download: DOWNLOAD = False,
) -> None:
    """Run our class and Diffusers' with these weights on the same random inputs, in float32, and compare."""
    from minwm.models.presets import preset as named
    from minwm.models.verification import TOLERANCE
    from minwm.models.verification import verify as verified

    found = verified(source, named(preset), download=download)
    typer.echo(
        f"largest difference {found.largest_difference:.1e}, "
        f"outputs deviate by {found.deviation:.2g}, tolerance {TOLERANCE:.0e} of that or absolute"
    )
    if not found.agrees:
        raise CheckpointError(f"{source}: our class and Diffusers' do not agree on these weights")
