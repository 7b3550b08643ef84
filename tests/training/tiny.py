"""A small training: two languages, a tiny model, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bimo.data.records import Document
from bimo.data.shards import encode_documents, write_tokens
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.recipe import Recipe
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import save_tokenizer, train_tokenizer
from bimo.training.build import decoder_config
from bimo.training.session import Texts

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"


def make_texts(folder: Path, extra: Sequence[str] = ()) -> Texts:
    contents = {name: (TEXTS / f"{name}.txt").read_text(encoding="utf-8").split("\n") for name in ("en", "zh")}
    backend = train_tokenizer([line for lines in contents.values() for line in lines], vocab_size=600, extra=extra)
    save_tokenizer(backend, folder / "tokenizer")
    tokenizer = Tokenizer.from_directory(folder / "tokenizer")
    train, validation = {}, {}
    for name, lines in contents.items():
        documents = [Document(line, f"{name}/{n}", name) for n, line in enumerate(lines)]
        for split, part, files in (("t", documents[:-3], train), ("v", documents[-3:], validation)):
            encoded = encode_documents(part, tokenizer)
            files[name] = write_tokens(folder / f"{name}-{split}", encoded, vocab_size=600, mark="")
    return Texts(train, validation, tokenizer)


def make_recipe(**training: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "steps": 24, "batch_tokens": 256, "micro_batch": 4, "eval_every": 8, "checkpoint_minutes": 0,
        "dtype": "float32", "trackers": [],
    }  # fmt: skip
    sources = [{"name": "en", "path": "x"}, {"name": "zh", "path": "y"}]
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 32, "dropout": 0.1}
    raw = {"name": "t", "data": {"sources": sources}, "model": shape, "training": {**defaults, **training}}
    return Recipe.model_validate(raw)


def build(recipe: Recipe, texts: Texts) -> Decoder:
    model = Decoder(decoder_config(recipe.model, texts.tokenizer.vocab_size))
    init_weights(model, recipe.seed)
    return model
