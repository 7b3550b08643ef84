"""Pairs: what a decoder reads and is asked for, padding, order, and what cannot be a pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bimo.data.loader import IGNORED
from bimo.data.pairs import PairLoader, encode_pairs
from bimo.data.records import Document, Message
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import SEQ2SEQ_TOKENS, save_tokenizer, train_tokenizer

PAIRS = [
    ("Open the file.", "打开文件。"),
    ("Close it", "关闭 👋🏽"),
    ("A much longer sentence than the others", "较长的句子"),
]
START = 7


def token_file(folder: Path, lengths: list[tuple[int, int]]) -> TokenFile:
    ids = iter(range(10, 10_000))
    encoded = [(f"p{n}", [next(ids) for _ in range(size)]) for n, pair in enumerate(lengths) for size in pair]
    return write_tokens(folder, encoded, vocab_size=10_000, mark="")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [text for pair in PAIRS for text in pair]
    save_tokenizer(train_tokenizer(texts, vocab_size=400, extra=SEQ2SEQ_TOKENS), folder)
    return Tokenizer.from_directory(folder)


def dialogue(source: str, target: str, number: int = 0) -> Document:
    messages = (Message("user", source), Message("assistant", target))
    return Document(f"{source}\n{target}", f"d{number}", "s", messages=messages)


def test_text_cannot_spell_a_control_token(tokenizer: Tokenizer) -> None:
    pair = dialogue("<|endoftext|>Open <extra_id_0>", "打开<pad>")
    source, target = (ids for _, ids in encode_pairs([pair], tokenizer, max_tokens=64, refuse=print))
    for ids, text in ((source, "<|endoftext|>Open <extra_id_0>"), (target, "打开<pad>")):
        assert [place for place, token in enumerate(ids) if token in tokenizer.special_ids] == [len(ids) - 1]
        assert tokenizer.decode(ids) == text


def test_what_is_read_and_what_is_asked_for(tmp_path: Path) -> None:
    loader = PairLoader([token_file(tmp_path / "t", [(3, 2), (1, 4)])], length=16, start_id=START, shuffle=False)
    batch = loader.next_batch(2)
    assert batch.source_ids[:, :3].tolist() == [[10, 11, 12], [15, 0, 0]]
    assert batch.source_mask[:, :3].tolist() == [[True, True, True], [True, False, False]]
    assert batch.targets[:, :4].tolist() == [[13, 14, IGNORED, IGNORED], [16, 17, 18, 19]]
    assert batch.input_ids[:, :4].tolist() == [[START, 13, 14, 0], [START, 16, 17, 18]]
    assert not batch.source_mask[:, 3:].any() and (batch.targets[:, 4:] == IGNORED).all()
    assert batch.num_targets == 6 and loader.provenance(batch) == ["p0", "p1"]
    assert batch.idle().num_targets == 0 and len(batch.idle()) == 1


def test_parts_have_few_columns_of_padding(tmp_path: Path) -> None:
    """In whole sixteens: every other size would be a product of its own."""
    loader = PairLoader([token_file(tmp_path / "t", [(3, 2), (20, 40)])], length=64, start_id=START, shuffle=False)
    batch = loader.next_batch(2)
    assert (batch.source_ids.shape, batch.targets.shape) == ((2, 32), (2, 48))
    first = batch.rows(slice(0, 1))
    assert (first.source_ids.shape, first.targets.shape) == ((1, 16), (1, 16)) and first.num_targets == 2


def test_a_batch_goes_by_length_and_every_pair_comes_once_an_epoch(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(1, 30, (40, 2)).tolist()
    file = token_file(tmp_path / "t", [(a, b) for a, b in sizes])
    loader = PairLoader([file], length=32, start_id=START, seed=3)
    seen: Counter[int] = Counter()
    for _ in range(5):
        batch = loader.next_batch(8)
        lengths = batch.source_mask.sum(1) + (batch.targets != IGNORED).sum(1)
        assert (np.diff(lengths) >= 0).all()
        seen.update(origin.row for origin in batch.origins)
    assert set(seen) == set(range(40)) and set(seen.values()) == {1}
    assert loader.row_tokens == round(len(file.tokens) / 40)
    halves = [PairLoader([file], length=32, start_id=START, seed=3).next_batch(8, rank=r, world_size=2) for r in (0, 1)]
    whole = PairLoader([file], length=32, start_id=START, seed=3).next_batch(8)
    assert sorted(origin for half in halves for origin in half.origins) == sorted(whole.origins)


def test_texts_come_back_and_each_half_has_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    refused: list[str] = []
    documents = [dialogue(*pair, number) for number, pair in enumerate(PAIRS)]
    file = write_tokens(
        tmp_path / "t",
        encode_pairs(documents, tokenizer, max_tokens=64, refuse=refused.append),
        vocab_size=tokenizer.vocab_size,
        mark="",
    )
    assert not refused and len(file.ends) == 2 * len(PAIRS)
    halves = np.split(file.tokens, file.ends[:-1])
    assert [tokenizer.decode(half.tolist()) for half in halves] == [text for pair in PAIRS for text in pair]
    assert all(half[-1] == tokenizer.eos_token_ids[0] for half in halves)
    # what generation gives the encoder is what training gave it
    assert halves[0].tolist() == tokenizer.encode(PAIRS[0][0])


def test_what_is_no_pair_is_counted(tokenizer: Tokenizer) -> None:
    odd = Document("a\nb", "odd", "s", messages=(Message("assistant", "a"), Message("user", "b")))
    turns = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "好"),
             Message("assistant", "是"))  # fmt: skip
    documents = [Document("plain", "p", "s"), odd, dialogue("x" * 500, "y"), Document("t", "t", "s", messages=turns)]
    refused: Counter[str] = Counter()
    kept = list(encode_pairs(documents, tokenizer, max_tokens=20, refuse=lambda reason: refused.update([reason])))
    assert refused == {"no question and answer": 2, "longer than 20 tokens": 1}
    assert [tokenizer.decode(ids) for _, ids in kept] == ["好", "是"]  # the last of several turns


def test_no_pairs_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source has text for one row"):
        PairLoader([token_file(tmp_path / "t", [])], length=8, start_id=START)
