"""Prompts to what a published backbone takes: its text encoders behind one call, each embedding computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minwm.models.embeddings import EmbeddingCache, TextEncoder
from minwm.models.encoders import load_glyphs, load_qwen, load_umt5
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.text import Embedded
from minwm.models.wan import WanConfig


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """folder: the published pipeline, in Diffusers' layout, that has the encoders. cache: where embeddings are kept."""

    folder: Path
    cache: Path


def prompt_encoder(
    config: EncodersConfig, architecture: WanConfig | HunyuanConfig
) -> Callable[[Sequence[str]], Embedded | HunyuanText]:
    """What turns prompts into the input of the architecture's `prompt`; on the CPU.

    Raises CheckpointError, naming what is missing and how to get it, for a folder without the encoders.
    """
    if isinstance(architecture, WanConfig):
        return EmbeddingCache(config.cache, load_umt5(config.folder)).encode
    language = EmbeddingCache(config.cache, load_qwen(config.folder))
    glyphs = EmbeddingCache(config.cache, load_glyphs(config.folder))
    return HunyuanPrompts(language, glyphs, architecture).encode


class HunyuanPrompts:
    """The language model and byT5 together; a first image's SigLIP states are left out."""

    def __init__(self, language: TextEncoder, glyphs: TextEncoder, architecture: HunyuanConfig) -> None:
        self._language, self._glyphs, self._architecture = language, glyphs, architecture

    def encode(self, prompts: Sequence[str]) -> HunyuanText:
        """Embeddings of prompts, as `Hunyuan.prompt` takes them."""
        b, width = len(prompts), self._architecture.vision_dim
        nothing = Embedded(torch.zeros(b, 1, width), torch.zeros(b, 1, dtype=torch.bool))
        return HunyuanText(self._language.encode(prompts), self._glyphs.encode(prompts), nothing)
