"""The real default model in float32: 64 greedy tokens equal transformers' on 20 prompts (en, zh, code, emoji)."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bimo

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was",
    "In 1969, humans",
    "Write a short poem about rain.",
    "The recipe calls for",
    "Dear Sir or Madam,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\n",
    "for (int i = 0; i < n; i++) {",
    "SELECT name, COUNT(*) FROM",
    "中国的首都是",
    "今天天气很好，",
    "从前有一座山，",
    "床前明月光，",
    "人工智能是",
    "Translate: 你好，世界 ->",
    "😀😃😄",
    "I love 🍕 and 🍣 because",
    "🇨🇳🇫🇷 flags:",
    "Résumé naïve café — ",
]


@pytest.fixture(scope="module")
def reference(smollm2_dir):
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(smollm2_dir):
    """All twenty at once, in one batch."""

    async def ask(model):
        return await asyncio.gather(*(model.agenerate(p, temperature=0, max_tokens=64) for p in PROMPTS))

    with bimo.load("smollm2", dtype="float32") as model:
        yield model, asyncio.run(ask(model))


def test_ids_equal(smollm2_dir, answers) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_dir)
    assert [answers[0].tokenizer.encode(p) for p in PROMPTS] == [theirs(p).input_ids for p in PROMPTS]


def test_every_token_is_the_references_choice(reference, answers) -> None:
    """One pass over prompt and answer: if at every place its most likely token is ours, its greedy text is ours."""
    model, completions = answers
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = model.tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + completion.tokens])).logits[0]
        chosen = logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
        assert chosen == completion.tokens, prompt
        assert completion.finish_reason == ("length" if len(completion.tokens) == 64 else "stop")


@pytest.mark.parametrize("number", [0, 10, 16])
def test_alone_and_by_their_own_loop_the_same(reference, answers, number) -> None:
    model, completions = answers
    ids = torch.tensor([model.tokenizer.encode(PROMPTS[number])])
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    assert theirs[0, ids.shape[1] :].tolist() == completions[number].tokens
    assert model.generate(PROMPTS[number], temperature=0, max_tokens=64).tokens == completions[number].tokens
