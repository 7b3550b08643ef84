"""What tests share: the real default model, and a tiny one that takes no time.

`smollm2_dir` is fetched once into the cache folder; the tests that need it are skipped by name where it cannot be.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread a worker, also in the servers that tests start: two workers already fill two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today?",
    "Once upon a time there was a small model that learned to write.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！今天天气怎么样？",
    "从前有一个小小的模型，它学会了写字。笔墨纸砚，文房四宝。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "🦊 jumps over 🐶 — naïve café, 1,234.56 € 😀👍🏽",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Where the engine's tests compute: everywhere this machine can."""
    return request.param


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Directory of the default model, from the cache, fetched on first use."""
    from bimo.errors import DownloadError
    from bimo.formats.hub import resolve

    try:
        return resolve("smollm2")
    except DownloadError as error:
        pytest.skip(f"smollm2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a real byte-level BPE (zh, en, code, emoji) and a chat template.

    512 tokens of context, a vocabulary of about 600; the same weights in every run. Read it, never write to it.
    """
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def make_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write the tiny model of `tiny_model_dir` to `directory`; another seed gives other weights."""
    from bimo.formats.huggingface import save_directory
    from bimo.models.config import DecoderConfig
    from bimo.models.decoder import Decoder

    source = directory.parent / f"{directory.name}-tokenizer"
    vocab_size = write_tiny_tokenizer(source)
    config = DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_positions=512,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger than usual, so that the next token depends visibly on what came before
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" not in name:
                parameter.sub_(1)
    save_directory(directory, config, model.named_parameters(), source=source)
    return directory


def write_tiny_tokenizer(directory: Path) -> int:
    """Train the tiny tokenizer on `SENTENCES` and write its files; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "chat_template": TEMPLATE,
        },
        "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()
