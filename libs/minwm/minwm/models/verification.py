"""Whether our class computes what Diffusers' does with the same weights.

Both get the same random latents, timesteps, prompt and, where the model takes one, first image. Needs Diffusers.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, load_backbone
from minwm.models.checkpoints import CONFIG, load_tensors, read_json
from minwm.models.conditions import Conditions, first_image
from minwm.models.context import Full
from minwm.models.conversion import convert, export_diffusers
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.presets import WorldConfig
from minwm.models.sources import Files, resolve, weight_files
from minwm.models.text import Embedded
from minwm.models.wan import WanConfig

TOLERANCE = 1e-5
TEXT_TOKENS = 9
TIMESTEPS = (713.3, 121.7)


@dataclass(frozen=True)
class Comparison:
    """The largest difference between two outputs, and the deviation of theirs, to measure it by."""

    largest_difference: float
    deviation: float

    @property
    def agrees(self) -> bool:
        """Whether they are the same but for rounding in float32."""
        return self.largest_difference < TOLERANCE * max(1.0, self.deviation)


def verify(source: str, config: WorldConfig, *, download: bool = False) -> Comparison:
    """Convert a checkpoint to a preset, in a temporary folder, and compare the two classes on it, in float32.

    A checkpoint in Diffusers' layout is given to Diffusers' class as it is, any other through our conversion. Both
    models are in memory together. Raises CheckpointError for what can't be converted, ConfigError for a preset that
    Diffusers has no class for.
    """
    architecture = config.architecture
    if architecture.conditions or (isinstance(architecture, WanConfig) and architecture.byte_text):
        raise ConfigError(f"preset {config.preset}: Diffusers has no class for it, expected one without conditions")
    with TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        convert(source, config, ours, dtype=torch.float32, download=download)
        given = resolve(source, download=download)[0].parent
        if (given / CONFIG).is_file() and "_class_name" in read_json(given / CONFIG):
            theirs = given
        else:
            export_diffusers(ours, theirs)
        return compare(load_backbone(ours), load_diffusers(theirs, config))


def load_diffusers(folder: Path, config: WorldConfig) -> nn.Module:
    """Diffusers' model in a folder of its layout, float32."""
    from diffusers import HunyuanVideo15Transformer3DModel, WanTransformer3DModel

    wan = isinstance(config.architecture, WanConfig)
    kind: Any = WanTransformer3DModel if wan else HunyuanVideo15Transformer3DModel
    model: nn.Module = kind.from_config(read_json(folder / CONFIG))
    load_tensors(model, Files(weight_files(folder)), where=str(folder))
    return model.eval()


@torch.no_grad()
def compare(
    ours: Backbone, theirs: nn.Module, *, frames: int = 3, rows: int = 4, columns: int = 6, seed: int = 0
) -> Comparison:
    """Outputs for two streams of latents of rows × columns, each at its own timestep."""
    random = torch.Generator().manual_seed(seed)
    parameter = next(theirs.parameters())
    architecture = ours.config.architecture

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=random).to(parameter)

    latents, image = normal(frames, architecture.channels, rows, columns), normal(architecture.channels, rows, columns)
    timesteps = torch.tensor(TIMESTEPS, device=parameter.device)
    text: HunyuanText | Embedded
    if isinstance(architecture, HunyuanConfig):
        text = HunyuanText(
            language=_embedded(normal(TEXT_TOKENS, architecture.text_dim), (TEXT_TOKENS, 4)),
            glyphs=_embedded(normal(TEXT_TOKENS, architecture.glyph_dim), (0, TEXT_TOKENS)),
            vision=_embedded(normal(TEXT_TOKENS, architecture.vision_dim), (TEXT_TOKENS, TEXT_TOKENS)),
        )
        expected = _hunyuan_output(theirs, latents, timesteps, text, image)
    else:
        text = _embedded(normal(architecture.text_length, architecture.text_dim), (architecture.text_length, 4))
        states = text.states * text.mask[..., None]  # Wan looks at its padding, which is zeros
        expected = theirs(latents.transpose(1, 2), timesteps.to(parameter), states).sample.transpose(1, 2)
    got = ours.model(
        latents,
        timesteps[:, None].expand(2, frames),
        ours.model.prompt(text, bidirectional=True),
        Full(frames),
        Conditions(image=first_image(image)),
    )
    return Comparison(float((got - expected).abs().max()), float(expected.std()))


def _embedded(states: Tensor, lengths: tuple[int, int]) -> Embedded:
    """States of which the first `lengths` of either stream are real."""
    places = torch.arange(states.shape[1], device=states.device)
    return Embedded(states, places < torch.tensor(lengths, device=states.device)[:, None])


def _hunyuan_output(theirs: nn.Module, latents: Tensor, timesteps: Tensor, text: HunyuanText, image: Tensor) -> Tensor:
    b, f, c, y, x = latents.shape
    given = latents.new_zeros(b, f, c + 1, y, x)
    given[:, 0] = first_image(image)
    output = theirs(
        torch.cat([latents, given], 2).transpose(1, 2),
        timesteps.to(latents.dtype),
        text.language.states,
        text.language.mask,
        encoder_hidden_states_2=text.glyphs.states,
        encoder_attention_mask_2=text.glyphs.mask,
        image_embeds=text.vision.states,
    )
    return output.sample.transpose(1, 2)  # type: ignore[no-any-return]
