"""A tiny random BERT with a real WordPiece tokenizer of two languages, as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bimo.formats.huggingface import save_directory
from bimo.models.encoder import Encoder, EncoderConfig
from bimo.tokenizer.train import save_tokenizer, train_tokenizer

__all__ = ["TEXTS", "make_encoder"]

TEXTS = {
    "en": [
        "The brush is made of bamboo and goat hair; soak it before writing.",
        "Ink sticks are ground on a stone with a little water.",
        "Rice paper drinks the ink, so the hand must be quick.",
        "Seals are cut in stone and pressed in red paste.",
        "Poems hang beside paintings in the same scroll.",
    ],
    "zh": [
        "毛笔用竹管和羊毫制成，写字之前先用水泡开。",
        "墨条加少许清水，在砚台上慢慢研磨。",
        "宣纸吸墨很快，所以下笔要果断。",
        "印章刻在石头上，蘸红色印泥盖下。",
        "诗与画常常写在同一幅卷轴上。",
    ],
}


def make_encoder(directory: Path, *, seed: int = 0, **change: Any) -> Path:
    """Write the encoder to `directory`; `change`: of its EncoderConfig."""
    source = directory.parent / f"{directory.name}-tokenizer"
    lines = [line for some in TEXTS.values() for line in some] * 3
    backend = train_tokenizer(lines, kind="wordpiece", vocab_size=400)
    save_tokenizer(backend, source)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_positions": 64}
    config = EncoderConfig(**{"vocab_size": backend.get_vocab_size(), **sizes, **change})
    model = Encoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    save_directory(directory, config, model.named_parameters(), source=source)
    return directory
