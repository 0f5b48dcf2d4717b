"""The worlds that benchmarks/streaming.py times: presets with random weights, at a size and with fidelities."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

import torch
import typer

from minwm.errors import ConfigError
from minwm.geometry.live import Speeds
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig, DecoderConfig, TinyDecoder
from minwm.models.backbones import Backbone
from minwm.models.costs import latent_size, picture_size
from minwm.models.layout import LatentLayout, VideoAutoencoder
from minwm.models.presets import WorldConfig, preset
from minwm.models.wan import WanConfig
from minwm.models.worlds import World, WorldCard
from minwm.streaming import Fidelity
from models import Device, longest_prompt, random_model


class Decoder(StrEnum):
    """Of presets that have a published autoencoder; `wan-doom` has its own."""

    tiny = "tiny"
    published = "published"


def world_config(name: str, chunk: int | None, fidelities: Sequence[str] | None) -> tuple[WorldConfig, list[Fidelity]]:
    """The preset with a window as wide as the fidelities ask for, and these: by default full, fewer steps, half window.

    Raises ConfigError for a backbone that the baseline loop is not of.
    """
    config = preset(name)
    if not isinstance(config.architecture, WanConfig):
        raise ConfigError(f"preset {name!r}: expected a Wan, which the baseline loop is of")
    window = config.history.window
    usual = [Fidelity(steps=steps, window=wide) for steps, wide in ((4, window), (2, window), (4, window // 2))]
    asked = [parse_fidelity(text) for text in fidelities or ()]
    levels = asked or [fidelity for fidelity in usual if fidelity.steps in config.levels]
    history = replace(
        config.history, chunk=chunk or config.history.chunk, window=max(fidelity.window for fidelity in levels)
    )
    return replace(config, history=history), levels


def parse_fidelity(text: str) -> Fidelity:
    """`4:16` is four steps and a window of sixteen."""
    steps, _, window = text.partition(":")
    if not (steps.isdecimal() and window.isdecimal()):
        raise typer.BadParameter(f"fidelity {text!r}: expected STEPS:WINDOW, as 4:16")
    return Fidelity(steps=int(steps), window=int(window))


def usual_sizes(name: str) -> Sequence[str]:
    """That a preset is timed at unless asked otherwise."""
    return ("96x128", "144x192") if name == "wan-doom" else ("{}x{}".format(*picture_size(name)),)


def random_world(config: WorldConfig, size: str, decoder: Decoder, device: Device, dtype: torch.dtype) -> World:
    """A world of random weights. Raises ConfigError for a size that is no whole number of tokens."""
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(f"size {size!r}: expected HEIGHTxWIDTH, as 96x128")
    card = WorldCard(
        name=config.preset,
        height=int(height),
        width=int(width),
        fps=17.5,
        intrinsics=(0.5, 0.5 * int(width) / int(height), 0.5, 0.5),
        speeds=Speeds(move=1.0, turn=30.0),
    )
    architecture = config.architecture
    latent_size(architecture, card.height, card.width)
    model = random_model(architecture, device, dtype)
    backbone = Backbone(model, config, lambda prompts: longest_prompt(architecture, device, len(prompts)))
    autoencoder = random_autoencoder(architecture, decoder).eval().requires_grad_(False).to(device.value, dtype)
    return World(card, backbone, autoencoder, {})


def random_autoencoder(architecture: WanConfig, decoder: Decoder) -> VideoAutoencoder:
    """The one that a preset streams through."""
    if architecture.byte_text:
        return Autoencoder(AutoencoderConfig(latent_channels=architecture.channels))
    if decoder is Decoder.tiny:
        return TinyDecoder(DecoderConfig(layout=LatentLayout(channels=architecture.channels, pixels=8, leading=True)))
    from diffusers import AutoencoderKLWan

    from minwm.models.wan_vae import WanVAE

    return WanVAE(AutoencoderKLWan())
