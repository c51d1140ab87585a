"""Tiny tokenizers and text encoders for the pipelines of `tiny_pipelines` that take prompts, from configurations.

A pipeline with its texts can be saved as a folder and opened by name, as users have them.
"""

from __future__ import annotations

from typing import Any

import torch

import tiny_pipelines

WORDS = ["a", "photo", "of", "cat", "house", "river", "tree", "red", "blue", "small", "on", "the", "table"]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
LENGTH = 8
"""Tokens of a prompt."""


def tokenizer() -> Any:
    """One token a word; unknown words share one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    model.pre_tokenizer = Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    model.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=LENGTH, padding_side="right", **SPECIAL)


def _ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def clip(width: int, projection: int | None = None) -> Any:
    """CLIP's text encoder; with a projection of the pooled output if that has a width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **_ids(),
    )
    return tiny_pipelines.seeded(CLIPTextModel if projection is None else CLIPTextModelWithProjection, config)


def t5(width: int, kind: str = "T5") -> Any:
    """The encoder of T5 or UMT5."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, **_ids()
    )
    return tiny_pipelines.seeded(getattr(transformers, f"{kind}EncoderModel"), config)


def gemma(width: int) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        **_ids(),
    )
    return tiny_pipelines.seeded(Gemma2Model, config)


def _parts(family: str) -> dict[str, Any]:
    if family in ("sd15", "img2img", "inpaint", "inpaint-unet", "controlnet", "lcm", "turbo"):
        return {"text_encoder": clip(16)}
    if family == "sdxl":
        return {"text_encoder": clip(8), "text_encoder_2": clip(8, 16)}
    if family == "sd3":
        return {"text_encoder": clip(8, 6), "text_encoder_2": clip(8, 6), "text_encoder_3": t5(16)}
    if family == "flux":
        return {"text_encoder": clip(12), "text_encoder_2": t5(16)}
    return {
        "text_encoder": {"pixart": lambda: t5(12), "sana": lambda: gemma(12), "wan": lambda: t5(16, "UMT5")}[family]()
    }


def with_texts(family: str, pipe: Any = None) -> Any:
    """The tiny pipeline of a family, or the given one; one that takes prompts has tokenizers and text encoders."""
    pipe = pipe or tiny_pipelines.FAMILIES[family].build()
    if not tiny_pipelines.FAMILIES[family].needs_transformers:
        return pipe
    parts = _parts(family)
    names = {name: tokenizer() for name in (key.replace("text_encoder", "tokenizer") for key in parts)}
    with torch.no_grad():
        pipe.register_modules(**parts, **names)
    if hasattr(pipe, "tokenizer_max_length"):
        pipe.tokenizer_max_length = LENGTH
    return pipe
