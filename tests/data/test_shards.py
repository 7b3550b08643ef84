"""Token files: what goes in comes out, and half a file is not taken for a whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bimo.data.records import Document, Message
from bimo.data.shards import TokenFile, encode_documents, write_tokens
from bimo.errors import DataError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["the cat sat. 床前明月光，疑是地上霜。"] * 3, vocab_size=320), folder)
    return Tokenizer.from_directory(folder)


def test_documents_become_tokens_and_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["床前明月光", "the cat", "", "🤦🏽‍♀️\x00", "a <|endoftext|> b"]
    documents = [Document(text, f"s/{n}", "s") for n, text in enumerate(texts)]
    file = write_tokens(tmp_path / "t", encode_documents(documents, tokenizer), vocab_size=320, mark="m")
    assert file.tokens.dtype == np.uint16
    starts = [0, *file.ends[:-1]]
    end = tokenizer.bos_token_id
    for text, first, last in zip(texts, starts, file.ends, strict=True):
        ids = [int(token) for token in file.tokens[first:last]]
        assert ids[0] == ids[-1] == end
        assert ids.count(end) == 2  # the document's own "<|endoftext|>" is ordinary text
        assert tokenizer.decode(ids) == text
    assert file.document_id(3) == "s/3"
    assert TokenFile.is_whole(tmp_path / "t", "m")
    assert not TokenFile.is_whole(tmp_path / "t", "another")


def test_dialogues_go_through_the_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = (Message("user", "hi"), Message("assistant", "你好"))
    encoded = list(encode_documents([Document("hi\n你好", "d", "s", messages=messages)], tokenizer))
    text = tokenizer.decode(encoded[0][1], skip_special_tokens=False)
    assert text == "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n你好<|im_end|>\n<|endoftext|>"


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t", [("a", [70_000, 1])], vocab_size=100_000, mark="")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [70_000, 1]


def test_no_documents_is_a_whole_file(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t", [], vocab_size=10, mark="")
    assert len(file.tokens) == len(file.ends) == 0


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "about.json"])
def test_a_torn_file_is_named(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path / "t", [("a", [1, 2, 3])], vocab_size=10, mark="")
    content = (tmp_path / "t" / name).read_bytes()
    (tmp_path / "t" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="run the same command again"):
        TokenFile.open(tmp_path / "t")


def test_a_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    def killed():  # type: ignore[no-untyped-def]
        yield "a", [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "t", killed(), vocab_size=10, mark="m")
    assert not TokenFile.is_whole(tmp_path / "t", "m")
    write_tokens(tmp_path / "t", [("a", [1])], vocab_size=10, mark="m")
    assert TokenFile.open(tmp_path / "t").tokens.tolist() == [1]
