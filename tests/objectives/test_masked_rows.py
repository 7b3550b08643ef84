"""Rows for BERT's objectives: what a row is made of, relations, whole words, and the joint loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bimo.data.loader import IGNORED, Origin
from bimo.data.records import Document
from bimo.data.shards import TokenFile, encode_documents, write_tokens
from bimo.errors import UsageError
from bimo.models.config import EncoderConfig
from bimo.models.encoder import Encoder
from bimo.models.initial import init_weights
from bimo.objectives.masked import masked_loss, next_sentence_loss
from bimo.objectives.masked_rows import MaskedLoader, MaskTokens, bert_loss
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import save_tokenizer, train_tokenizer

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [line for name in ("en", "zh") for line in (TEXTS / f"{name}.txt").read_text("utf-8").split("\n")]
    save_tokenizer(train_tokenizer(lines, kind="wordpiece", vocab_size=3000), folder)
    return Tokenizer.from_directory(folder)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> MaskTokens:
    return MaskTokens.of(tokenizer)


@pytest.fixture(scope="module")
def file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    lines = [line for name in ("en", "zh") for line in (TEXTS / f"{name}.txt").read_text("utf-8").split("\n") if line]
    documents = [Document(line, f"d{n}", "s") for n, line in enumerate(lines)]
    folder = tmp_path_factory.mktemp("tokens") / "t"
    return write_tokens(folder, encode_documents(documents, tokenizer), vocab_size=tokenizer.vocab_size, mark="")


def ids_of(batch: object, row: int) -> list[int]:
    """What the row was before words were hidden."""
    shown, wanted = batch.input_ids[row], batch.targets[row]  # type: ignore[attr-defined]
    return np.where(wanted == IGNORED, shown, wanted)[batch.mask[row]].tolist()  # type: ignore[attr-defined]


def place(file: TokenFile, tokens: list[int]) -> set[int]:
    """The documents in which these tokens stand one after the other."""
    text = file.tokens.astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(text, len(tokens))
    starts = np.nonzero((windows == tokens).all(1))[0]
    return {int(np.searchsorted(file.ends, start, side="right")) for start in starts}


def test_relations_are_what_they_say(file: TokenFile, tokens: MaskTokens) -> None:
    loader = MaskedLoader([file], length=64, tokens=tokens, seed=0)
    num_rows = min(60, loader.num_rows[0])
    batch = loader.next_batch(num_rows)
    assert 0.2 < batch.relations.mean() < 0.8 and batch.input_ids.shape[1] <= 64
    for row in range(num_rows):
        ids = ids_of(batch, row)
        assert ids[0] == tokens.cls_id and ids[-1] == tokens.sep_id and ids.count(tokens.sep_id) == 2
        middle = ids.index(tokens.sep_id)
        first, second = ids[1:middle], ids[middle + 1 : -1]
        segments = batch.segments[row][batch.mask[row]].tolist()
        assert segments == [0] * (middle + 1) + [1] * (len(second) + 1)
        if batch.relations[row]:
            assert not place(file, first) & place(file, second) or len(second) < 4
        else:
            assert place(file, first + second)  # it does go on like this


def test_rows_are_reproducible_and_drawn_anew_each_epoch(file: TokenFile, tokens: MaskTokens) -> None:
    loader = MaskedLoader([file], length=48, tokens=tokens, seed=4)
    batch = loader.next_batch(5)
    again = MaskedLoader([file], length=48, tokens=tokens, seed=4).batch(batch.origins[2:4])
    part = batch.rows(slice(2, 4))
    assert (part.input_ids == again.input_ids).all() and (part.targets == again.targets).all()
    later = loader.batch([origin._replace(epoch=1) for origin in batch.origins])
    assert not np.array_equal(later.targets, batch.targets)


def test_without_relations_every_token_is_read_once(file: TokenFile, tokens: MaskTokens) -> None:
    loader = MaskedLoader([file], length=64, tokens=tokens, next_sentence=False, shuffle=False)
    batch = loader.next_batch(loader.num_rows[0])
    assert batch.relations is None and not batch.segments.any()
    read = [token for row in range(len(batch)) for token in ids_of(batch, row)[1:-1]]
    assert read == file.tokens[: len(read)].tolist() and len(read) == 62 * loader.num_rows[0]
    share = batch.num_targets / len(read)
    assert 0.13 < share < 0.17
    assert not np.isin(batch.targets, list(tokens.special_ids)).any()


def test_words_in_both_languages(tokenizer: Tokenizer, tokens: MaskTokens) -> None:
    """Characters of one Chinese word, and pieces of one English word, share a number; characters of two do not."""
    text = "自然语言处理 unquestionably good"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [tokenizer.token_spelling(token) for token in ids]
    numbers = tokens.words(ids)
    assert len(numbers) == len(ids)
    for before, after, same in zip(pieces, pieces[1:], np.diff(numbers) == 0, strict=False):
        assert after.startswith("##") <= same, (before, after)
    han = [number for piece, number in zip(pieces, numbers, strict=True) if len(piece) == 1 and piece >= "一"]
    assert 1 < len(set(han)) < len(han)
    assert tokens.words([]) == []


def test_the_joint_loss(file: TokenFile, tokens: MaskTokens) -> None:
    """A relation weighs as much as a row's hidden words, also in parts of a batch; accuracies are counted by hand."""
    config = EncoderConfig(
        vocab_size=len(tokens.pieces), hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64,
        max_positions=64, masked_head=True, next_sentence_head=True,
    )  # fmt: skip
    model = Encoder(config).eval()
    init_weights(model, 0)
    batch = MaskedLoader([file], length=64, tokens=tokens).next_batch(6)
    loss = bert_loss(model, batch)
    hidden = model(*(torch.from_numpy(x) for x in (batch.input_ids, batch.mask, batch.segments)))
    labels, relations = torch.from_numpy(batch.targets), torch.from_numpy(batch.relations)
    scores, pairs = model.masked_logits(hidden), model.next_sentence_logits(hidden)
    words = float(masked_loss(scores, labels, reduction="sum"))
    expected = words + float(next_sentence_loss(pairs, relations)) * 6 * 0.15 * 64
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert loss.num_targets == batch.num_targets and loss.means["masked_nats"][0] == pytest.approx(words, rel=1e-5)
    hits = int((scores.argmax(-1) == labels)[labels != IGNORED].sum())
    assert loss.means["masked_accuracy"] == (hits, batch.num_targets)
    assert loss.means["next_sentence_accuracy"] == (int((pairs.argmax(-1) == relations).sum()), 6)
    parts = [bert_loss(model, batch.rows(slice(start, start + 2))).total for start in (0, 2, 4)]
    assert float(sum(parts)) == pytest.approx(float(loss.total), rel=1e-5)
    idle = bert_loss(model.train(), batch.idle())
    assert float(idle.total) == 0 and idle.num_targets == 0 and not idle.means


def test_one_document_has_no_other(tokens: MaskTokens, tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t", [("one", list(range(10, 110)))], vocab_size=3000, mark="")
    batch = MaskedLoader([file], length=32, tokens=tokens, seed=1).next_batch(3)
    assert not batch.relations.any()


def test_single_tokens_and_other_tokenizers(tokens: MaskTokens, tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t", [(str(n), [10 + n]) for n in range(90)], vocab_size=3000, mark="")
    loader = MaskedLoader([file], length=8, tokens=tokens, seed=1)
    batch = loader.batch([Origin(0, row, 0) for row in range(loader.num_rows[0])])
    assert batch.num_targets >= len(batch)  # at least one a row, however short
    save_tokenizer(train_tokenizer(["plain text 文字"], vocab_size=300), tmp_path / "bpe")
    with pytest.raises(UsageError, match="wordpiece"):
        MaskTokens.of(Tokenizer.from_directory(tmp_path / "bpe"))
