"""Contrastive loss against a statement in float64 and sentence-transformers' formula; copies, large batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from bimo.data.embedding_pairs import EmbeddingBatch, EmbeddingPairLoader, encode_embedding_pairs
from bimo.data.records import Document
from bimo.data.shards import write_tokens
from bimo.formats.huggingface import load_encoder
from bimo.models.encoder import Encoder
from bimo.objectives.embed import embedding_loss, embedding_objective
from bimo.recipe import EmbeddingRecipe
from bimo.tokenizer.load import Tokenizer
from bimo.training.loop import TrainingState, train
from bimo.training.optim import make_optimizers
from bimo.training.validation import validate
from tests.encoders import TEXTS, make_encoder
from tests.training.tiny import make_recipe

DOCUMENTS = [
    Document(text, f"{language}/{n}", language, title=text[: len(text) // 3])
    for language, texts in TEXTS.items()
    for n, text in enumerate(texts)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture
def model(folder: Path) -> Encoder:
    return load_encoder(folder)


@pytest.fixture
def loader(folder: Path, tmp_path: Path) -> EmbeddingPairLoader:
    tokenizer = Tokenizer.from_directory(folder)
    encoded = encode_embedding_pairs(DOCUMENTS, tokenizer, max_tokens=64, refuse=lambda name, why: pytest.fail(why))
    file = write_tokens(tmp_path / "tokens", encoded, vocab_size=tokenizer.vocab_size, mark="")
    return EmbeddingPairLoader([file], length=64, seed=1)


def vectors(model: Encoder, batch: EmbeddingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Text by text, without any padding, in float64."""
    sides = ((batch.query_ids, batch.query_mask), (batch.passage_ids, batch.passage_mask))
    found = [
        [model(torch.from_numpy(ids[row][mask[row]])[None])[0].double().mean(0) for row in range(len(batch))]
        for ids, mask in sides
    ]
    return torch.stack(found[0]), torch.stack(found[1])


def stated(queries: Any, passages: Any, same: Any, temperature: float, smoothing: float) -> float:
    """The formula, pair by pair."""
    total = 0.0
    for i, query in enumerate(queries):
        cosines = [float(query @ passage / query.norm() / passage.norm()) for passage in passages]
        allowed = [j for j in range(len(passages)) if j == i or not same[i][j]]
        norm = math.log(sum(math.exp(cosines[j] / temperature) for j in allowed))
        log_p = {j: cosines[j] / temperature - norm for j in allowed}
        total -= (1 - smoothing) * log_p[i] + smoothing * sum(log_p.values()) / len(allowed)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_formula(model: Encoder, loader: EmbeddingPairLoader, symmetric: bool, smoothing: float) -> None:
    batch = loader.next_batch(8)
    with torch.inference_mode():
        queries, passages = vectors(model, batch)
        loss = embedding_loss(model, batch, temperature=0.1, symmetric=symmetric, label_smoothing=smoothing)
    none = [[False] * 8] * 8
    expected = stated(queries, passages, none, 0.1, smoothing)
    if symmetric:
        expected = (expected + stated(passages, queries, none, 0.1, smoothing)) / 2
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    assert loss.num_targets == 8
    cosines = F.normalize(queries, dim=1) @ F.normalize(passages, dim=1).T
    assert loss.means == {"in_batch_recall": (float((cosines.argmax(1) == torch.arange(8)).sum()), 8)}


def test_it_is_sentence_transformers_formula(model: Encoder, loader: EmbeddingPairLoader) -> None:
    """MultipleNegativesRankingLoss, and the symmetric one: cross-entropy of cosines times 20 with the diagonal."""
    batch = loader.next_batch(10)
    with torch.inference_mode():
        queries, passages = vectors(model, batch)
        scores = F.cosine_similarity(queries[:, None], passages[None], dim=-1) * 20
        plain = F.cross_entropy(scores, torch.arange(10))
        both = (plain + F.cross_entropy(scores.T, torch.arange(10))) / 2
        assert float(embedding_loss(model, batch).total) / 10 == pytest.approx(float(plain), rel=1e-4)
        assert float(embedding_loss(model, batch, symmetric=True).total) / 10 == pytest.approx(float(both), rel=1e-4)


@pytest.mark.parametrize("copied", ["query", "passage"])
def test_copies_are_no_negatives(model: Encoder, loader: EmbeddingPairLoader, copied: str) -> None:
    """Pair 2 has the query, or the passage, of pair 0: neither counts against the other."""
    batch = loader.next_batch(5)
    for name in (f"{copied}_ids", f"{copied}_mask"):
        getattr(batch, name)[2] = getattr(batch, name)[0]
    same = [[{i, j} == {0, 2} for j in range(5)] for i in range(5)]
    with torch.inference_mode():
        loss = embedding_loss(model, batch, temperature=0.5, symmetric=True, label_smoothing=0.2)
        queries, passages = vectors(model, batch)
    sides = (stated(queries, passages, same, 0.5, 0.2), stated(passages, queries, same, 0.5, 0.2))
    assert float(loss.total) == pytest.approx(sum(sides) / 2, rel=1e-4)
    unaware = (
        stated(queries, passages, [[False] * 5] * 5, 0.5, 0.2),
        stated(passages, queries, [[False] * 5] * 5, 0.5, 0.2),
    )
    assert float(loss.total) != pytest.approx(sum(unaware) / 2, rel=1e-3)


def test_a_batch_of_copies_and_of_one_pair_have_no_loss_and_finite_gradients(
    model: Encoder, loader: EmbeddingPairLoader
) -> None:
    one = loader.next_batch(1)
    copies = EmbeddingBatch(*(np.repeat(array, 3, 0) for array in (
        one.query_ids, one.query_mask, one.passage_ids, one.passage_mask)))  # fmt: skip
    for batch in (one, copies, one.idle()):
        model.zero_grad()
        model.train()
        loss = embedding_loss(model, batch, label_smoothing=0.1, symmetric=True)
        loss.total.backward()
        assert float(loss.total.detach()) == pytest.approx(0, abs=1e-6)
        grads = [weight.grad for name, weight in model.named_parameters() if "pooler" not in name]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert one.idle().num_targets == 0 and not loss.num_targets


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_at_once_change_no_gradient(tmp_path: Path, loader: EmbeddingPairLoader, dropout: float) -> None:
    """The gradient is that of all rows together; with dropout, that of the same rows drawn alike and kept whole."""
    folder = make_encoder(tmp_path / "tiny", dropout=dropout, attention_dropout=dropout)
    batch, found = loader.next_batch(7), []
    for rows_at_once, kept in ((3, False), (3 if dropout else 0, True)):
        model = load_encoder(folder).train()
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            if kept:
                patch.setattr("bimo.objectives.embed.checkpoint", lambda embed, *part, **_: embed(*part))
            loss = embedding_loss(model, batch, rows_at_once=rows_at_once)
            loss.total.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((float(loss.total.detach()), grads))
    (cached, cached_grads), (whole, whole_grads) = found
    assert cached == pytest.approx(whole, rel=1e-5) and set(cached_grads) == set(whole_grads)
    for name, grad in whole_grads.items():
        torch.testing.assert_close(cached_grads[name], grad, rtol=1e-4, atol=1e-5)


def test_scores_are_exact_in_autocast(model: Encoder, loader: EmbeddingPairLoader) -> None:
    """Scores of 19.80 and 19.79 would be the same in bfloat16."""
    angles = torch.tensor([[0.1415, 0.1449], [0.1449, 0.1415]], dtype=torch.float64)  # their cosines: 0.9900, 0.9895
    near, far = float(angles[0, 0].cos()), float(angles[0, 1].cos())
    side = (1 - near**2) ** 0.5
    queries = torch.tensor([[1.0, 0, 0], [0, 0, 0]])  # the second one likes both alike
    passages = torch.tensor([[near, side, 0], [far, 0, (1 - far**2) ** 0.5]])
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        given = iter((queries, passages))
        patch.setattr("bimo.objectives.embed._embed", lambda *_: next(given))
        loss = embedding_loss(model, loader.next_batch(2))
    gap = (near - far) / 0.05
    assert float(loss.total) == pytest.approx(math.log(1 + math.exp(-gap)) + math.log(2), rel=1e-4)
    assert gap == pytest.approx(0.0097, abs=2e-4)


def test_autocast_is_near(model: Encoder, loader: EmbeddingPairLoader) -> None:
    batch = loader.next_batch(6)
    with torch.inference_mode():
        plain = float(embedding_loss(model, batch).total)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = embedding_loss(model, batch).total
    assert mixed.dtype == torch.float32 and float(mixed) == pytest.approx(plain, rel=0.1)


def test_it_learns_both_languages(model: Encoder, loader: EmbeddingPairLoader) -> None:
    loss, make_loader = embedding_objective(EmbeddingRecipe(temperature=0.1, symmetric=True, rows_at_once=4))
    assert make_loader is EmbeddingPairLoader
    everything = make_loader(loader.files, length=64, shuffle=False).next_batch(len(DOCUMENTS))

    def recall() -> float:
        with torch.inference_mode():
            hits, count = loss(model.eval(), everything).means["in_batch_recall"]
        return hits / count

    before = recall()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model.train(), loader.next_batch(8)).total.backward()
        optimizer.step()
    assert before < 0.7 and recall() == 1.0


def test_the_loop_and_validation_take_such_batches(model: Encoder, loader: EmbeddingPairLoader) -> None:
    """Parts of 4, 4 and 2 pairs a step; the score counts pairs and has no bits per byte."""
    recipe = make_recipe(steps=3, batch_tokens=10 * loader.row_tokens, micro_batch=4, learning_rate=1e-3).training
    loss, make_loader = embedding_objective(EmbeddingRecipe())
    state = TrainingState(model, make_optimizers(model, recipe), loader)
    steps = list(train(state, loss, recipe))
    assert [step.step for step in steps] == [1, 2, 3] and all(math.isfinite(step.loss) for step in steps)
    sizes = np.zeros(400, np.int64)
    score = validate(state, loss, recipe, {"both": loader.files[0]}, sizes, 64, make_loader)["both"]
    assert score.num_tokens == 10 and score.num_bytes == 0 and set(score.figures) == {"in_batch_recall"}


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"temperature": float("nan")}, {"rows_at_once": -1}, {"temp": 1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        EmbeddingRecipe(**wrong)  # type: ignore[arg-type]
