"""The text and image encoders that published backbones were trained with.

Transformers does the arithmetic; what is here is how prompts are cleaned, put into templates, cropped and padded,
which weights depend on. Encoders are frozen, states have their model's dtype, and no prompt is ever cut short:
one with more tokens than the encoder's `length` is an InputError. Loading reads a pipeline's folder as Diffusers
saves it, strictly and never online.
"""

import hashlib
import html
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minwm.errors import CheckpointError, InputError
from minwm.models.embeddings import padded
from minwm.models.text import Embedded
from minwm.models.transformer import require_length

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
HUNYUAN = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"

# What HunyuanVideo asks of its language model, the runs of spaces included
_SYSTEM = (9 * " ").join(
    (
        "You are a helpful assistant. Describe the video by detailing the following aspects:",
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
_BEFORE = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"  # 108 of Qwen's tokens
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_GLYPHS = re.compile('"(.*?)"|“(.*?)”')


class Encoder(nn.Module, ABC):
    """A frozen Transformers model, with what prepares its input."""

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @property
    def identity(self) -> str:
        """A digest of class, configuration, preparation and weights. Reads all of the weights: ask once."""
        passing = ("_name_or_path", "transformers_version", "dtype")
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in passing}
        settings = json.dumps([type(self).__name__, config, self._preparation()], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @abstractmethod
    def _preparation(self) -> dict[str, Any]:
        """What the tokenizer or image processor is made of."""


class PromptEncoder(Encoder):
    """A tokenizer and a language model; see `minwm.models.embeddings.TextEncoder`."""

    length: ClassVar[int]
    special_tokens: ClassVar[bool] = True
    crop = 0

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Embedded:
        """States (b, length, c) and mask (b, length) of at least one prompt. Raises InputError for one too long.

        A prompt's states are the same in any batch, but for rounding.
        """
        rows = [torch.zeros(0, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)]
        rows *= len(prompts)
        texts = {index: text for index, prompt in enumerate(prompts) if (text := self._text(prompt)) is not None}
        if texts:
            tokens = self._tokens(list(texts.values())).to(self.model.device)
            counts = tokens.attention_mask.sum(1).tolist()
            for index, count in zip(texts, counts, strict=True):
                require_length(f"prompt[{index}]", count - self.crop, self.length)
            states = self._states(tokens.input_ids, tokens.attention_mask)
            for index, count, row in zip(texts, counts, states, strict=True):
                rows[index] = row[self.crop : count]
        return padded(rows, self.length)

    @abstractmethod
    def _text(self, prompt: str) -> str | None:
        """What the language model reads; None when the prompt has nothing for it."""

    def _tokens(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=self.special_tokens, return_tensors="pt"
        )

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (b, l) to states (b, l, c)."""
        return self.model(tokens, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]

    def _preparation(self) -> dict[str, Any]:
        return self.tokenizer.get_vocab()  # type: ignore[no-any-return]


class UMT5Encoder(PromptEncoder):
    """Wan's: UMT5 of the whole prompt, with broken characters, HTML entities and runs of spaces mended."""

    length = 512

    def _text(self, prompt: str) -> str:
        from ftfy import fix_text

        return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


class QwenEncoder(PromptEncoder):
    """HunyuanVideo's: the language model of Qwen2.5-VL, told to describe a video, up to its last layer but two.

    The states begin with the prompt's and end with those of the template's end.
    """

    length = 1000
    special_tokens = False

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.crop = self._tokens([_BEFORE]).input_ids.shape[1]

    def _text(self, prompt: str) -> str:
        return _BEFORE + (prompt or " ") + _AFTER

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        out = self.model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-3]  # type: ignore[no-any-return]


class GlyphEncoder(PromptEncoder):
    """HunyuanVideo's second one: byT5 of the words to be written in the picture, which the prompt has in quotes.

    A prompt without quotes has states of zero and a mask that is false throughout.
    """

    length = 256

    def _text(self, prompt: str) -> str | None:
        glyphs = dict.fromkeys(straight or curly for straight, curly in _GLYPHS.findall(prompt))
        return "".join(f'Text "{glyph}". ' for glyph in glyphs) or None


class VisionEncoder(Encoder):
    """SigLIP of a stream's first image."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model)
        self.processor = processor

    @property
    def length(self) -> int:
        """Patches of an image."""
        return (self.model.config.image_size // self.model.config.patch_size) ** 2  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Embedded:
        """Images (b, 3, y, x) in [0, 1] of any size to states (b, length, c) and a mask that is true throughout."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"image: {images.dtype} of shape {tuple(images.shape)}, expected floats (b, 3, y, x)")
        # Published models saw 8-bit images, which are resized in 8 bits too
        pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        prepared = self.processor(list(pixels), input_data_format="channels_last", return_tensors="pt")
        inputs = prepared.pixel_values.to(self.model.device, self.model.dtype)
        states = self.model(inputs).last_hidden_state
        return Embedded(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))

    def _preparation(self) -> dict[str, Any]:
        return self.processor.to_dict()  # type: ignore[no-any-return]


def load_umt5(folder: Path, dtype: torch.dtype = torch.float32) -> UMT5Encoder:
    """Wan's encoder: `text_encoder` and `tokenizer` of a pipeline's folder. Raises CheckpointError."""
    from transformers import UMT5EncoderModel

    model = _load_model(UMT5EncoderModel, folder, "text_encoder", WAN, dtype)
    return UMT5Encoder(model, _load_tokenizer(folder, "tokenizer", WAN))


def load_qwen(folder: Path, dtype: torch.dtype = torch.float32) -> QwenEncoder:
    """HunyuanVideo's encoder: `text_encoder` and `tokenizer` of a pipeline's folder. Raises CheckpointError."""
    from transformers import Qwen2_5_VLTextModel

    model = _load_model(Qwen2_5_VLTextModel, folder, "text_encoder", HUNYUAN, dtype)
    return QwenEncoder(model, _load_tokenizer(folder, "tokenizer", HUNYUAN))


def load_glyphs(folder: Path, dtype: torch.dtype = torch.float32) -> GlyphEncoder:
    """HunyuanVideo's byT5: `text_encoder_2` and `tokenizer_2` of a pipeline's folder. Raises CheckpointError."""
    from transformers import T5EncoderModel

    model = _load_model(T5EncoderModel, folder, "text_encoder_2", HUNYUAN, dtype)
    return GlyphEncoder(model, _load_tokenizer(folder, "tokenizer_2", HUNYUAN))


def load_vision(folder: Path, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """HunyuanVideo's SigLIP: `image_encoder` and `feature_extractor` of a pipeline's folder. Raises CheckpointError."""
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    model = _load_model(SiglipVisionModel, folder, "image_encoder", HUNYUAN, dtype)
    return VisionEncoder(model, _load(SiglipImageProcessorPil, folder, "feature_extractor", HUNYUAN))


def _load(kind: Any, folder: Path, part: str, repository: str, **options: Any) -> Any:
    """One part of a pipeline's folder. CheckpointError says where `repository` on the hub has it."""
    path = folder / part
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder, expected a pipeline's {part}; {_advice(folder, part, repository)}"
        )
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        problem = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: missing or damaged files ({problem}); {_advice(folder, part, repository)}"
        ) from error


def _advice(folder: Path, part: str, repository: str) -> str:
    return f"get it with `hf download {repository} --include '{part}/*' --local-dir {folder}`"


def _load_tokenizer(folder: Path, part: str, repository: str) -> Any:
    """A tokenizer with its vocabulary: Transformers goes on without one when the files are not there."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, folder, part, repository)
    pieces = set(tokenizer.vocab_files_names.values()) - {"tokenizer.json"}
    missing = sorted(name for name in pieces if not (folder / part / name).is_file())
    if missing and not (folder / part / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder / part}: has no vocabulary, expected tokenizer.json or {', '.join(missing)}; "
            f"{_advice(folder, part, repository)}"
        )
    return tokenizer


def _load_model(kind: Any, folder: Path, part: str, repository: str, dtype: torch.dtype) -> Any:
    """A model whose weights fit exactly: what Transformers would make up is an error."""
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = _load(kind, folder, part, repository, dtype=dtype, **options)
    problems = [f"missing {name}" for name in found["missing_keys"]]
    problems += [f"unexpected {name}" for name in found["unexpected_keys"]]
    problems += [
        f"{name} has shape {tuple(shape)}, expected {tuple(expected)}"
        for name, shape, expected in found["mismatched_keys"]
    ]
    if problems:
        raise CheckpointError(
            f"{folder / part}: does not fit a {kind.__name__}: " + "; ".join(sorted(problems)) + f" ({repository} does)"
        )
    return model
