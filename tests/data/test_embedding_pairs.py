"""Pairs for embeddings: what the encoder reads of each half, how batches are cut, and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bimo.data.embedding_pairs import EmbeddingPairLoader, cut_text, encode_embedding_pairs, text_encoder
from bimo.data.loader import IGNORED
from bimo.data.records import Document, Message
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer
from tests.encoders import TEXTS, make_encoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(make_encoder(tmp_path_factory.mktemp("encoder") / "tiny"))


def titled(title: str, text: str, name: str = "页/1") -> Document:
    return Document(text, name, "s", title=title)


def fail(name: str, why: str) -> None:
    raise AssertionError(f"{name} {why}")


PAIRS = [titled(text[:4], text, f"{language}/{n}") for language in TEXTS for n, text in enumerate(TEXTS[language])]


def test_a_text_is_read_as_the_tokenizer_encodes_it(tokenizer: Tokenizer) -> None:
    encode = text_encoder(tokenizer)
    texts = ["", "你好，世界", "Hello, world! 🦊", *TEXTS["zh"], *TEXTS["en"]]
    assert [ids.tolist() for ids in encode(texts)] == [tokenizer.encode(text) for text in texts]
    spelled = encode(["a [SEP] b"])[0]
    assert (spelled[1:-1] != tokenizer.backend.token_to_id("[SEP]")).all()
    with pytest.raises(UsageError, match="lone surrogate"):
        encode(["\ud83e"])


def test_a_tokenizer_without_ends_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match="puts 0 tokens around a text"):
        text_encoder(Tokenizer.from_directory(tiny_model_dir))


def test_pairs_become_batches_and_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = Document("", "对话/1", "s", messages=(Message("user", "毛笔是什么？"), Message("assistant", "写字的工具")))
    documents = [*PAIRS, asked]
    encoded = encode_embedding_pairs(
        documents, tokenizer, max_tokens=64, refuse=fail, query_prefix="query: ", passage_prefix="passage: "
    )
    file = write_tokens(tmp_path / "t", encoded, vocab_size=tokenizer.vocab_size, mark="")
    loader = EmbeddingPairLoader([TokenFile.open(file.folder)], length=64, seed=0)
    batch = loader.next_batch(len(documents))
    wanted = {
        (*tokenizer.encode(f"query: {query}"), *tokenizer.encode(f"passage: {passage}"))
        for query, passage in (document.pair or (document.title, document.text) for document in documents)
    }

    def pairs(some: object) -> list[tuple[int, ...]]:
        sides = ((some.query_ids, some.query_mask), (some.passage_ids, some.passage_mask))
        return [tuple(n for ids, mask in sides for n in ids[row][mask[row]].tolist()) for row in range(len(some))]

    assert set(pairs(batch)) == wanted
    lengths = [len(pair) for pair in pairs(batch)]
    assert lengths == sorted(lengths)
    assert "对话/1" in loader.provenance(batch)
    assert batch.num_targets == len(documents) and batch.targets.tolist() == list(range(len(documents)))
    part = batch.rows(slice(1, 3))
    assert pairs(part) == pairs(batch)[1:3] and part.origins == batch.origins[1:3] and part.targets.tolist() == [0, 1]
    assert part.passage_ids.shape[1] <= batch.passage_ids.shape[1]
    assert batch.idle().num_targets == 0 and batch.idle().targets.tolist() == [IGNORED]


def test_what_is_no_pair_is_named(tokenizer: Tokenizer) -> None:
    said: list[tuple[str, str]] = []
    documents = [
        titled("", "没有标题", "a"),
        titled("标题", " \n", "b"),
        titled("笔", "字" * 100, "c"),
        titled("墨", "黑", "d"),
    ]
    encoded = list(
        encode_embedding_pairs(documents, tokenizer, max_tokens=20, refuse=lambda name, why: said.append((name, why)))
    )
    assert [name for name, _ in encoded] == ["d", "d"]
    assert [name for name, _ in said] == ["a", "b", "c"]
    assert "is no pair" in said[0][1] and said[2][1] == "has 102 tokens, 20 are read"


def test_long_texts_are_cut_when_that_is_wanted(tokenizer: Tokenizer) -> None:
    cut: list[str] = []
    documents = [titled("笔", "字" * 100, "c")]
    encoded = encode_embedding_pairs(
        documents, tokenizer, max_tokens=20, refuse=fail, shorten=lambda name, _: cut.append(name)
    )
    query, passage = (ids for _, ids in encoded)
    assert cut == ["c"] and len(passage) == 20 and len(query) == 3
    whole = text_encoder(tokenizer)(["字" * 100])[0]
    assert passage.tolist() == [*whole[:19].tolist(), whole[-1]]
    assert cut_text(whole, 102) is whole and np.array_equal(cut_text(whole, 2), whole[[0, -1]])
