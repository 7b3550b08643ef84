"""Classes: the loss beside transformers', several tasks in one head, R-Drop, a new head on an old model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bimo.data.labels import LabelBatch, Labels, encode_labelled, label_set
from bimo.data.loader import IGNORED
from bimo.data.records import Document
from bimo.data.shards import write_tokens
from bimo.formats.huggingface import load_encoder, save_directory
from bimo.models.encoder import Encoder
from bimo.objectives.classify import class_logits, class_loss, class_objective
from bimo.objectives.r_drop import symmetric_divergence, with_r_drop
from bimo.tokenizer.load import Tokenizer
from bimo.training.build import with_classes
from tests.encoders import TEXTS, make_encoder

LABELS = Labels(("language::en", "language::zh", "长度::long", "长度::short", "长度::中"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", labels=LABELS.names, masked_head=True)


@pytest.fixture
def model(folder: Path) -> Encoder:
    return load_encoder(folder)


def batch_of(targets: list[int], labels: Labels = LABELS, width: int = 12) -> LabelBatch:
    draws = np.random.default_rng(0)
    ids = draws.integers(5, 90, (len(targets), width))
    mask = np.arange(width) < draws.integers(3, width + 1, len(targets))[:, None]
    allowed = labels.together[np.maximum(targets, 0)]
    return LabelBatch(ids * mask, mask, np.array(targets), allowed, np.ones(len(targets), np.float32))


def test_it_is_transformers_loss(model: Encoder, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = ("好", "bad", "neutral", "a", "b")
    config = dataclasses.replace(model.config, labels=names, masked_head=False)
    single = Encoder(config).eval()
    single.load_state_dict(model.state_dict(), strict=False)
    save_directory(tmp_path / "m", config, single.named_parameters(), source=folder)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    batch = batch_of([0, 3, 4, 1, 2, 2], Labels(names))
    loss = class_loss(single, batch)
    ids, mask, targets = (torch.from_numpy(array) for array in (batch.input_ids, batch.mask, batch.targets))
    expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=targets)
    assert loss.total.item() / loss.num_targets == pytest.approx(expected.loss.item(), rel=1e-5)
    assert loss.means == {"accuracy": (float((expected.logits.argmax(-1) == targets).sum()), 6)}
    smoothed = class_loss(single, batch, label_smoothing=0.1)
    torchs = F.cross_entropy(expected.logits, targets, label_smoothing=0.1, reduction="sum")
    assert smoothed.total.item() == pytest.approx(torchs.item(), rel=1e-5)
    (loss.total / 6).backward()
    expected.loss.backward()
    ours = single.classifier.weight.grad
    assert torch.allclose(ours, theirs.classifier.weight.grad, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_task_has_its_own_softmax(model: Encoder, smoothing: float) -> None:
    """As if each task had a head of its own, in float64, text by text."""
    batch = batch_of([0, 4, 1, 2])
    batch = dataclasses.replace(batch, weights=np.array([2.0, 0.5, 1.0, 0.25], np.float32))
    expected, hits = 0.0, 0
    with torch.no_grad():
        for row, target in enumerate(batch.targets):
            ids = torch.from_numpy(batch.input_ids[row][batch.mask[row]])[None]
            own = np.flatnonzero(batch.allowed[row])
            scores = model.class_logits(model(ids))[0, own].double().tolist()
            norm = math.log(sum(map(math.exp, scores)))
            costs = [norm - score for score in scores]
            hits += int(own[int(np.argmax(scores))] == target)
            right = costs[own.tolist().index(target)]
            expected += batch.weights[row] * ((1 - smoothing) * right + smoothing * sum(costs) / len(own))
        loss = class_loss(model, batch, label_smoothing=smoothing)
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert loss.means["accuracy"] == (hits, 4) and loss.num_targets == 4
    logits, _ = class_logits(model, batch)
    assert (logits.softmax(-1)[~torch.from_numpy(batch.allowed)] == 0).all()


def test_other_tasks_classes_are_not_learned(model: Encoder) -> None:
    class_loss(model, batch_of([0, 1, 1]), label_smoothing=0.1).total.backward()
    slopes = model.classifier.weight.grad
    assert slopes[:2].abs().sum() > 0 and not slopes[2:].any()


def test_parts_sum_to_the_whole_and_an_idle_row_is_nothing(model: Encoder) -> None:
    batch = batch_of([0, 4, 1, 2, 3, 0])
    with torch.no_grad():
        whole = float(class_loss(model, batch).total)
        parts = sum(float(class_loss(model, batch.rows(slice(n, n + 2))).total) for n in range(0, 6, 2))
    assert whole == pytest.approx(parts, rel=1e-5)
    idle = class_loss(model.train(), batch.idle())
    assert idle.num_targets == 0 and idle.total.item() == 0 and not idle.means
    idle.total.backward()
    used = [weight for name, weight in model.named_parameters() if not name.startswith("masked_head")]
    assert all(weight.grad is not None and not weight.grad.any() for weight in used)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_r_drop_counts_a_task_and_a_weight_as_the_loss_does(model: Encoder, smoothing: float) -> None:
    batch = batch_of([0, 4, 1, IGNORED, 2])
    batch = dataclasses.replace(batch, weights=np.array([2.0, 0.5, 1.0, 1.0, 0.25], np.float32))
    model.train()
    torch.manual_seed(1)
    once, again = (class_loss(model, batch, label_smoothing=smoothing) for _ in range(2))
    torch.manual_seed(1)
    first, _ = class_logits(model, batch)
    second, _ = class_logits(model, batch)
    kept = batch.targets != IGNORED
    apart = (symmetric_divergence(first, second)[kept] * torch.from_numpy(batch.weights[kept])).sum()
    torch.manual_seed(1)
    loss = with_r_drop(class_loss, 2.0)(model, batch, label_smoothing=smoothing)
    assert loss.total.item() == pytest.approx(((once.total + again.total) / 2 + 2.0 * apart / 4).item(), rel=1e-4)
    assert loss.num_targets == 4 and apart.item() > 0
    loss.total.backward()
    assert model.classifier.weight.grad.isfinite().all()


def test_a_new_head_keeps_the_other_weights(folder: Path) -> None:
    base = load_encoder(folder)
    found = with_classes(base, ("x", "y", "z"), seed=3)
    assert found.config.labels == ("x", "y", "z") and found.masked_head is None and not found.training
    assert found.classifier.weight.shape == (3, 32) and not found.classifier.bias.any()
    assert abs(found.classifier.weight.std().item() - 0.02) < 0.01
    theirs = dict(base.named_parameters())
    for name, weight in found.named_parameters():
        if not name.startswith("classifier"):
            assert torch.equal(weight, theirs[name]) and weight.data_ptr() != theirs[name].data_ptr(), name
    same = with_classes(base, ("x", "y", "z"), seed=3)
    assert torch.equal(same.classifier.weight, found.classifier.weight)
    assert not torch.equal(with_classes(base, ("x", "y", "z"), seed=4).classifier.weight, found.classifier.weight)
    kept = with_classes(base, LABELS.names, seed=3)
    assert torch.equal(kept.classifier.weight, base.classifier.weight)


def test_a_base_without_a_pooler_gets_one(tmp_path: Path) -> None:
    base = load_encoder(make_encoder(tmp_path / "m", pooler=False, masked_head=True)).train()
    found = with_classes(base, ("a", "b"), seed=0)
    assert found.pooler is not None and found.pooler.weight.std() > 0.01 and found.training
    assert torch.equal(found.embed_tokens.weight, base.embed_tokens.weight)
    save_directory(tmp_path / "new", found.config, found.named_parameters(), source=tmp_path / "m")
    assert load_encoder(tmp_path / "new").config.labels == ("a", "b")


def test_it_learns_two_tasks_at_once(folder: Path, tmp_path: Path) -> None:
    """Which language a text is in, and whether it speaks of stone: both right, by one model."""
    tokenizer = Tokenizer.from_directory(folder)
    texts = [text for some in TEXTS.values() for text in some]
    languages = [
        Document(text, f"l#{n}", "language", label="en" if text.isascii() else "zh") for n, text in enumerate(texts)
    ]
    stones = [
        Document(text, f"s#{n}", "石", label="有" if "stone" in text or "石" in text else "no")
        for n, text in enumerate(texts)
    ]
    labels = label_set([*languages, *stones])
    files = [
        write_tokens(
            tmp_path / documents[0].source,
            encode_labelled(documents, tokenizer, labels, max_tokens=64, refuse=lambda name, why: pytest.fail(why)),
            vocab_size=tokenizer.vocab_size,
            mark="",
        )
        for documents in (languages, stones)
    ]
    loss, make_loader = class_objective(labels, {"石": 2.0})
    loader = make_loader(files, length=64, seed=0)
    assert loader.loss_weights == [1.0, 2.0]
    model = with_classes(load_encoder(folder), labels.names, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        batch = loader.next_batch(20)
        optimizer.zero_grad()
        (loss(model, batch).total / 20).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for file in files:
            found = loss(model, make_loader([file], length=64, shuffle=False).next_batch(10))
            assert found.means["accuracy"] == (10, 10), file.folder.name
