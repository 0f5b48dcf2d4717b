"""Prompt and image encoders against Diffusers' pipelines on the same small random Transformers models.

Tokenizers read bytes, so that every text has tokens of its own; byT5's is the published one.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minwm.errors import CheckpointError, InputError
from minwm.models.embeddings import EmbeddingCache
from minwm.models.encoders import (
    Encoder,
    GlyphEncoder,
    PromptEncoder,
    QwenEncoder,
    UMT5Encoder,
    VisionEncoder,
    load_glyphs,
    load_qwen,
    load_umt5,
    load_vision,
)
from minwm.models.text import Embedded

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LOADERS = {
    UMT5Encoder: (load_umt5, "text_encoder", "tokenizer"),
    QwenEncoder: (load_qwen, "text_encoder", "tokenizer"),
    GlyphEncoder: (load_glyphs, "text_encoder_2", "tokenizer_2"),
    VisionEncoder: (load_vision, "image_encoder", "feature_extractor"),
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

fragments = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["&amp;lt;", "\u00a0", " \t\n", "schÃ¶n", "“exit”", '"exit"', '""', "“a", 'b"', "<|im_end|>"]),
)
prompts = st.lists(fragments, max_size=6).map("".join)
batches = st.lists(prompts, min_size=1, max_size=3)


def byte_tokenizer(special: list[str], *, ends: bool, **options: Any) -> Any:
    """A tokenizer of bytes; `ends`: the last special token ends every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {special[-1]}", special_tokens=[(special[-1], len(special) - 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], **options)


def randomised(model: Any) -> Any:
    """Every weight moved off its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def new_encoder(kind: type[Encoder], seed: int = 0) -> Any:
    """A small encoder of the class, with the published kind of model in it."""
    import transformers as tf

    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind is UMT5Encoder:
            model = tf.UMT5EncoderModel(tf.UMT5Config(vocab_size=260, **t5))
            return UMT5Encoder(randomised(model), byte_tokenizer(["<pad>", "</s>"], ends=True))
        if kind is QwenEncoder:
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
            rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
            config = tf.Qwen2_5_VLTextModel.config_class(vocab_size=260, rope_parameters=rope, **sizes, **heads)
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            tokenizer = byte_tokenizer(special, ends=False, chat_template=CHAT)
            return QwenEncoder(randomised(tf.Qwen2_5_VLTextModel(config)), tokenizer)
        if kind is GlyphEncoder:
            model = tf.T5EncoderModel(tf.T5Config(vocab_size=384, **t5))
            return GlyphEncoder(randomised(model), tf.ByT5Tokenizer())
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = tf.SiglipVisionModel(tf.SiglipVisionConfig(image_size=28, patch_size=7, **sizes))
        return VisionEncoder(randomised(model), tf.SiglipImageProcessorPil(size={"height": 28, "width": 28}))


@pytest.fixture(scope="module")
def umt5() -> UMT5Encoder:
    return new_encoder(UMT5Encoder)


@pytest.fixture(scope="module")
def qwen() -> QwenEncoder:
    return new_encoder(QwenEncoder)


@pytest.fixture(scope="module")
def glyphs() -> GlyphEncoder:
    return new_encoder(GlyphEncoder)


@pytest.fixture(scope="module")
def vision() -> VisionEncoder:
    return new_encoder(VisionEncoder)


def assert_same(found: Embedded, states: Tensor, mask: Tensor) -> None:
    """The same mask and the same real states; ours are zero elsewhere."""
    assert torch.equal(found.mask, mask.bool())
    torch.testing.assert_close(found.states, states * mask[..., None], **CLOSE)


@given(batch=batches)
@example(batch=["  two &amp;quot;doors&amp;quot;\n\n and schÃ¶n  ", ""])
@settings(max_examples=10)
def test_wans_states_are_those_of_its_pipeline(umt5: UMT5Encoder, batch: list[str]) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline(umt5.tokenizer, umt5.model, vae=None, scheduler=None)
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(batch, do_classifier_free_guidance=False, max_sequence_length=512)
    found = umt5.encode(batch)
    torch.testing.assert_close(found.states, states, **CLOSE)
    assert torch.equal(found.mask, (states != 0).any(-1))


@given(batch=batches)
@example(batch=["", "\na hall", "a corridor with “two” doors"])
@settings(max_examples=6)
def test_qwens_states_are_those_of_hunyuans_pipeline(qwen: QwenEncoder, batch: list[str]) -> None:
    from diffusers import HunyuanVideo15Pipeline
    from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5 as published

    parameters = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    messages = published.format_text_input(["prompt"], parameters["system_message"].default)
    before = qwen.tokenizer.apply_chat_template(messages[0], tokenize=False).partition("prompt<|im_end|>")[0]
    with torch.no_grad():
        states, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
            qwen.model, qwen.tokenizer, batch, torch.device("cpu"), crop_start=len(qwen.tokenizer(before).input_ids)
        )
    assert_same(qwen.encode(batch), states, mask)


def test_qwens_states_have_not_seen_its_last_two_layers_nor_its_norm(qwen: QwenEncoder) -> None:
    batch = ["a hall", "a corridor"]
    other = new_encoder(QwenEncoder)
    for unseen in (other.model.norm, *other.model.layers[-2:]):
        randomised(unseen)
    assert torch.equal(other.encode(batch).states, qwen.encode(batch).states)
    randomised(other.model.layers[-3])
    assert not torch.equal(other.encode(batch).states, qwen.encode(batch).states)


@given(batch=batches)
@example(batch=["no quotes", 'a sign “EXIT” over "IN", “EXIT” again', '""', "“”"])
@settings(max_examples=10)
def test_glyphs_states_are_those_of_hunyuans_pipeline(glyphs: GlyphEncoder, batch: list[str]) -> None:
    from diffusers import HunyuanVideo15Pipeline

    with torch.no_grad():
        states, mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
            glyphs.tokenizer, glyphs.model, batch, torch.device("cpu")
        )
    assert_same(glyphs.encode(batch), states, mask)


def test_a_prompt_without_quotes_has_no_glyphs(glyphs: GlyphEncoder) -> None:
    none, some = glyphs.encode(["a hall", "a hall that says “GO”"]).mask
    assert not none.any()
    assert some.sum() == len('Text "GO". ') + 1  # a byte each, and the end
    alone = glyphs.encode(["a hall"])
    assert alone.states.shape == (1, 256, 16) and not alone.states.any() and not alone.mask.any()


@pytest.mark.parametrize("size", [(28, 28), (45, 80)], ids=["its own size", "another"])
def test_an_images_states_are_those_of_hunyuans_pipeline(vision: VisionEncoder, size: tuple[int, int]) -> None:
    from diffusers import HunyuanVideo15ImageToVideoPipeline
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    with torch.no_grad():
        states = [
            HunyuanVideo15ImageToVideoPipeline._get_image_embeds(
                vision.model, vision.processor, Image.fromarray(picture), torch.device("cpu")
            )
            for picture in pictures
        ]
    found = vision.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    assert found.states.shape == (2, vision.length, 16)
    assert_same(found, torch.cat(states), torch.ones(2, 16))


def test_overshoots_of_an_image_are_clamped(vision: VisionEncoder) -> None:
    image = torch.rand(1, 3, 30, 40) * 1.4 - 0.2
    assert torch.equal(vision.encode(image).states, vision.encode(image.clamp(0, 1)).states)


@pytest.mark.parametrize("image", [torch.rand(3, 28, 28), torch.rand(1, 1, 28, 28), torch.zeros(1, 3, 28, 28).byte()])
def test_what_is_no_batch_of_images_is_refused(vision: VisionEncoder, image: Tensor) -> None:
    with pytest.raises(InputError, match=r"image: .*, expected floats \(b, 3, y, x\)"):
        vision.encode(image)


@pytest.mark.parametrize("name", ["umt5", "qwen", "glyphs"])
def test_a_prompts_states_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    encoder: PromptEncoder = request.getfixturevalue(name)
    batch = ["“a”", "a long corridor that says “NO ENTRY”", "", "a “hall”"]
    together = encoder.encode(batch)
    assert together.states.shape[:2] == together.mask.shape == (4, encoder.length)
    assert torch.equal(together.states, encoder.encode(batch).states)
    for index, prompt in enumerate(batch):
        alone = encoder.encode([prompt])
        assert torch.equal(alone.mask[0], together.mask[index])
        torch.testing.assert_close(alone.states[0], together.states[index], **CLOSE)


@pytest.mark.parametrize(
    ("name", "around", "beside"),
    [("umt5", "{}", 1), ("qwen", "{}", len("<\n<assistant\n")), ("glyphs", "a “{}”", len('Text "". ') + 1)],
)
def test_a_prompt_is_refused_rather_than_cut(
    name: str, around: str, beside: int, request: pytest.FixtureRequest
) -> None:
    encoder: PromptEncoder = request.getfixturevalue(name)
    longest = encoder.length - beside
    assert encoder.encode(["“short”", around.format("x" * longest)]).mask[1].all()
    with pytest.raises(InputError, match=rf"prompt\[1\]: has {encoder.length + 1} tokens.* at most {encoder.length}"):
        encoder.encode(["“short”", around.format("x" * (longest + 1))])


@pytest.mark.parametrize("name", ["umt5", "qwen", "glyphs"])
def test_a_cache_gives_back_the_encoders_states(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    encoder: PromptEncoder = request.getfixturevalue(name)
    batch = ["a hall", "a sign “EXIT”"]
    cache = EmbeddingCache(tmp_path, encoder)
    for _ in range(2):
        found = cache.encode(batch)
        assert torch.equal(found.states, encoder.encode(batch).states)
        assert torch.equal(found.mask, encoder.encode(batch).mask)


@pytest.mark.parametrize("kind", LOADERS)
def test_identity_changes_with_the_weights_and_with_nothing_else(kind: type[Encoder]) -> None:
    first, again, other = new_encoder(kind), new_encoder(kind), new_encoder(kind, seed=1)
    assert first.identity == again.identity != other.identity
    with torch.no_grad():
        next(again.parameters()).view(-1)[3] += 1e-3
    assert first.identity != again.identity
    assert first.to(torch.bfloat16).identity != new_encoder(kind).identity


def saved(encoder: Any, folder: Path) -> tuple[Path, Path]:
    """A pipeline's folder with the encoder in it; the parts' folders."""
    _, model, preparation = LOADERS[type(encoder)]
    encoder.model.save_pretrained(folder / model)
    (encoder.processor if isinstance(encoder, VisionEncoder) else encoder.tokenizer).save_pretrained(
        folder / preparation
    )
    return folder / model, folder / preparation


@pytest.mark.parametrize("kind", LOADERS)
def test_a_folder_as_diffusers_saves_it_is_loaded(kind: type[Encoder], tmp_path: Path) -> None:
    encoder = new_encoder(kind)
    saved(encoder, tmp_path)
    loaded = LOADERS[kind][0](tmp_path)
    assert loaded.identity == encoder.identity
    inputs: Any = torch.rand(2, 3, 40, 30) if kind is VisionEncoder else ["a “hall”", ""]
    assert torch.equal(loaded.encode(inputs).states, encoder.encode(inputs).states)
    assert LOADERS[kind][0](tmp_path, torch.bfloat16).encode(inputs).states.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_part_is_named_and_where_to_get_it(kind: type[Encoder], tmp_path: Path) -> None:
    load, *parts = LOADERS[kind]
    for part, path in zip(parts, saved(new_encoder(kind), tmp_path), strict=True):
        aside = path.rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match=rf"{path}: no such folder.*`hf download \S+ --include '{part}/\*'"):
            load(tmp_path)
        path.mkdir()
        with pytest.raises(CheckpointError, match=rf"{path}: missing or damaged files.*`hf download"):
            load(tmp_path)
        path.rmdir()
        aside.rename(path)


@pytest.mark.parametrize(("load", "kind"), [(load_umt5, "T5Tokenizer"), (load_qwen, "Qwen2Tokenizer")])
def test_a_tokenizer_without_its_vocabulary_is_refused(load: Any, kind: str, tmp_path: Path) -> None:
    encoder = new_encoder(UMT5Encoder if load is load_umt5 else QwenEncoder)
    _, tokenizer = saved(encoder, tmp_path)
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(CheckpointError, match=rf"{tokenizer}: has no vocabulary, expected tokenizer.json or "):
        load(tmp_path)


def test_weights_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    path = saved(new_encoder(UMT5Encoder), tmp_path)[0] / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    weights |= {"proj": torch.ones(3), "encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 5)}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as failure:
        load_umt5(tmp_path)
    for problem in (
        "missing encoder.final_layer_norm.weight",
        "unexpected proj",
        "encoder.block.0.layer.0.SelfAttention.q.weight has shape (2, 5), expected (16, 16)",
    ):
        assert problem in str(failure.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = saved(new_encoder(UMT5Encoder), tmp_path)[0]
    (path / "model.safetensors").write_bytes(b"damaged files")
    with pytest.raises(CheckpointError, match=rf"{path}: missing or damaged"):
        load_umt5(tmp_path)
