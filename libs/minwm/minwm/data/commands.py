"""The commands `minwm data …`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minwm.progress import progress_bar

OUT = Annotated[Path, typer.Option(help="Folder of the new dataset; must not hold one yet.")]


def register(app: typer.Typer) -> None:
    """Add `data` to the command line."""
    data = typer.Typer(no_args_is_help=True, help="Record game play and turn it into training clips.")
    data.command(name="record")(record)
    data.command(name="build")(build)
    data.command(name="describe")(describe)
    app.add_typer(data, name="data")


def record(
    out: OUT,
    episodes: Annotated[int, typer.Option(help="Recordings, dealt to the scenes in turn.")] = 6,
    frames: Annotated[int, typer.Option(help="RGB frames a recording (17.5 make a second).")] = 512,
    scene: Annotated[list[str] | None, typer.Option(help="wad:map, such as freedoom1:E1M3; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed takes the same walks.")] = 0,
) -> None:
    """Play VizDoom headless; keep every frame with its camera pose and command."""
    from minwm.data.doom import DoomConfig
    from minwm.data.doom import record as play
    from minwm.data.episode import write_episodes

    config = DoomConfig(
        episodes=episodes,
        frames_per_episode=frames,
        seed=seed,
        **({"scenes": tuple(scene)} if scene else {}),  # type: ignore[arg-type]
    )
    with progress_bar("recording", episodes) as report:
        manifest = write_episodes(play(config), out, {"source": "vizdoom", **asdict(config)}, report)
    typer.echo(f"{manifest.samples} episodes in {out}")


def build(
    episodes: Annotated[Path, typer.Argument(help="Dataset made by `minwm data record`.")],
    out: OUT,
    autoencoder: Annotated[Path, typer.Option(help="Autoencoder folder.")] = Path("models/wan-doom/autoencoder"),
    clip_frames: Annotated[int, typer.Option(help="Latent frames a clip (4 RGB frames each).")] = 32,
    heldout_every: Annotated[int, typer.Option(help="Keep each n-th episode from training.")] = 5,
) -> None:
    """Annotate, encode and cut recordings into clips, and write them as shards with a manifest."""
    from minwm.data.build import ClipsConfig, build_clips
    from minwm.data.episode import KIND, iterate_episodes
    from minwm.data.shards import read_manifest
    from minwm.models.checkpoints import load_autoencoder
    from minwm.precision import native_dtype

    config = ClipsConfig(clip_frames=clip_frames, heldout_every=heldout_every)
    model = load_autoencoder(autoencoder, native_dtype())
    with progress_bar("encoding", read_manifest(episodes, KIND).samples) as report:
        manifest = build_clips(iterate_episodes(episodes), model, out, config, report)
    typer.echo(f"{manifest.samples} clips in {out}: {manifest.about['clips']}, {manifest.about['dropped']} dropped")


def describe(folder: Annotated[Path, typer.Argument(help="A dataset of clips.")]) -> None:
    """Print a dataset's manifest: counts, actions, speeds, checksums; every shard is verified."""
    import yaml

    from minwm.data.clips import load_clips

    _, manifest = load_clips(folder)
    typer.echo(yaml.safe_dump({**asdict(manifest), "digest": manifest.digest()}, sort_keys=False))
