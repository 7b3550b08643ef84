"""Tiny tokenizers of both kinds, as GGUF metadata and as model directories, made in milliseconds."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from bimo.formats.gguf_tokenizer import tokenizer_from_gguf
from bimo.tokenizer.load import Tokenizer

__all__ = ["SAMPLES", "byte_level_metadata", "load", "sentencepiece_metadata", "with_template"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it? We're sure they'll come.",
    "你好，世界！今天的天气很好，我们去公园散步吧。人工智能正在改变世界。",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i)\n",
    "Numbers 1234567890 3.14 2024-01-02 €100 ½",
    "🎉🧑‍🚀👨‍👩‍👧 emoji café naïve",
] * 4

SAMPLES = [
    "",
    " ",
    "Hello world",
    "  two leading, trailing  ",
    "你好，世界！人工智能与笔墨。",
    "🧑‍🚀 👨‍👩‍👧‍👦 🇨🇳 ❤️‍🔥 1️⃣",
    "def f(x):\n\treturn x**2  # 平方\n\n\n\nclass A:\r\n    pass",
    "1234567 3.14159 ½ ٣ 一二三",
    "It's WE'RE they'LL DON't",
    "a\u0301 é ﬁ Å \u00a0\u3000\u200b tab\tend",
    "mixed中文and English混排，123个token。",
    "\n\n  \n\t \r\n x",
    "ᠮᠣᠩᠭᠣᠯ العربية हिन्दी ไทย 한국어",
    "!!!???...———《》“”",
]


@lru_cache(maxsize=4)
def byte_level_metadata(control: tuple[str, ...] = ()) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE with ChatML's control tokens, others if wanted, and one plain added token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)

    model = json.loads(backend.to_str())["model"]
    tokens = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    types = [3 if text in special else 1 for text in tokens]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, "<think>", *control],
        "tokenizer.ggml.token_type": [*types, 4, *[3] * len(control)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


@lru_cache(maxsize=1)
def sentencepiece_metadata() -> dict[str, Any]:
    """GGUF metadata of a SentencePiece BPE with byte fallback; many Chinese characters and emoji are bytes in it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=260, limit_alphabet=110, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)

    model = json.loads(backend.to_str())["model"]
    pieces = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(model["merges"])))}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(ranks.get(text, 10_000)) for text in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def load(metadata: dict[str, Any], directory: Path) -> Tokenizer:
    """Write the metadata's tokenizer to a directory and load it."""
    tokenizer_from_gguf(metadata, directory)
    return Tokenizer.from_directory(directory)


def with_template(tokenizer: Tokenizer, template: str | None, directory: Path) -> Tokenizer:
    """The same tokenizer in another directory, with another chat template."""
    shutil.copytree(tokenizer.directory, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_directory(directory)
