"""The loss of answers: equal to the formula in float64, packed or not, of one task or several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bimo.data.example_loader import ExampleLoader
from bimo.data.example_tokens import encode_examples
from bimo.data.records import Document, Message
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import DataError
from bimo.models.decoder import Decoder
from bimo.objectives.answers import answer_logits, answer_loss
from bimo.objectives.cross_entropy import linear_cross_entropy
from bimo.tokenizer.load import Tokenizer
from bimo.training.finetune import load_trainable, open_base

TALKS = [("你好吗？", "我很好，谢谢。"), ("What is ink?", "A black liquid."), ("笔", "brush 🖌"), ("a", "b")]


def make_file(folder: Path, tokenizer: Tokenizer, talks: list[tuple[str, str]]) -> TokenFile:
    documents = [
        Document("", f"t#{n}", "t", messages=(Message("user", q), Message("assistant", a)))
        for n, (q, a) in enumerate(talks)
    ]
    encoded = encode_examples(documents, tokenizer, max_tokens=500, refuse=lambda *why: pytest.fail(str(why)))
    return write_tokens(folder, encoded, vocab_size=tokenizer.vocab_size, mark="")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Decoder:
    loaded: Decoder = load_trainable(tiny_model_dir, open_base("tiny", tiny_model_dir).config)
    return loaded


def stated(model: Decoder, tokenizer: Tokenizer, talks: list[tuple[str, str]]) -> tuple[float, int]:
    """-Σ log p of the answers' tokens and the end of turn, each dialogue alone, in float64."""
    total, count = 0.0, 0
    for question, answer in talks:
        head = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False)
        ids = tokenizer.encode(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n", False
        )
        end = len(ids) - 1  # the line end after the turn's end is not learned
        with torch.no_grad():
            log_p = model.logits(model(torch.tensor([ids])))[0].double().log_softmax(-1)
        total -= sum(float(log_p[place - 1, ids[place]]) for place in range(len(head), end))
        count += end - len(head)
    return total, count


def test_loss_is_that_of_the_answers_alone(tmp_path: Path, tiny_model_dir: Path, model: Decoder) -> None:
    tokenizer = Tokenizer.from_directory(tiny_model_dir)
    loader = ExampleLoader([make_file(tmp_path / "a", tokenizer, TALKS)], length=256, shuffle=False)
    batch = loader.next_batch(loader.num_rows[0])
    assert len(batch) == 1  # all four in one row
    loss = answer_loss(model, batch)
    total, count = stated(model, tokenizer, TALKS)
    assert loss.num_targets == count
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)
    logits, words = answer_logits(model, batch)
    kept = words >= 0
    assert float(F.cross_entropy(logits[kept], words[kept], reduction="sum")) == pytest.approx(total, rel=1e-5)


def test_tasks_are_normalised_by_their_tokens(tmp_path: Path, tiny_model_dir: Path, model: Decoder) -> None:
    tokenizer = Tokenizer.from_directory(tiny_model_dir)
    parts = [TALKS[:2], TALKS[2:]]
    files = [make_file(tmp_path / name, tokenizer, talks) for name, talks in zip("ab", parts, strict=True)]
    loader = ExampleLoader(files, length=256, loss_weights=[1.0, 0.5], shuffle=False)
    batch = loader.next_batch(2)
    (first, n), (second, m) = (stated(model, tokenizer, talks) for talks in parts)
    loss = answer_loss(model, batch)
    assert float(loss.total.detach()) / loss.num_targets == pytest.approx(
        (first / n + 0.5 * second / m) / 1.5, rel=1e-5
    )


def test_factors_and_frozen_heads(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    targets[[3, 9]] = -100
    factors = torch.rand(37, generator=generator)
    ours = linear_cross_entropy(hidden, weight, targets, 0.1, factors)
    each = F.cross_entropy(hidden @ weight.t(), targets, reduction="none", label_smoothing=0.1, ignore_index=-100)
    reference = (each * factors).sum()
    assert float(ours) == pytest.approx(float(reference), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [hidden, weight]), torch.autograd.grad(reference, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, 0.1, factors)
    frozen.backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_template_without_an_end_is_an_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    with pytest.raises(DataError, match="end-of-turn"):
        make_file(tmp_path / "a", tokenizer, TALKS)
