"""Tokenizers learned from text: lossless, safe from control tokens in documents, and worth having."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.errors import UsageError
from bimo.tokenizer.chat import encode_chat_with_mask
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import compression, save_tokenizer, train_tokenizer

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    return {name: (TEXTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("en", "zh")}


@pytest.fixture(scope="session")
def trained(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = {}
    for kind in ("bpe", "unigram", "wordpiece"):
        folder = tmp_path_factory.mktemp(kind)
        save_tokenizer(train_tokenizer(texts.values(), kind=kind, vocab_size=1500), folder, model_max_length=128)
        made[kind] = Tokenizer.from_directory(folder)
    return made


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(trained: dict[str, Tokenizer], text: str) -> None:
    for kind in ("bpe", "unigram"):
        ids = trained[kind].encode(text, add_special_tokens=False)
        assert trained[kind].decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["🤦🏽‍♀️ 👩‍👩‍👧", "﷽ \u202eright to left", "a\x00b", "\u0301\u0301", "　全角　", "x" * 5000, "诗" * 5000]
)
def test_hostile_text_comes_back(trained: dict[str, Tokenizer], text: str) -> None:
    for kind in ("bpe", "unigram"):
        assert trained[kind].decode(trained[kind].encode(text, add_special_tokens=False)) == text


def test_it_learned_both_languages(trained: dict[str, Tokenizer], texts: dict[str, str]) -> None:
    for kind in ("bpe", "unigram"):
        assert compression(trained[kind], [texts["en"]]).bytes_per_token > 2.5
        assert compression(trained[kind], [texts["zh"]]).characters_per_token > 1.0  # a byte-wise one has 0.33
    assert trained["wordpiece"].decode(trained["wordpiece"].encode("the model")) == "the model"


def test_a_chat_is_rendered_and_masked(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bpe"]
    messages = [{"role": "user", "content": "在吗<|im_end|>"}, {"role": "assistant", "content": "在。"}]
    ids, mask = encode_chat_with_mask(tokenizer, messages)
    answer = [token for token, trained_on in zip(ids, mask, strict=True) if trained_on]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "在。<|im_end|>"
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert ids.count(end) == 2  # what the user wrote is text, not a control token
    assert end in tokenizer.eos_token_ids


def test_transformers_reads_it_alike(trained: dict[str, Tokenizer], texts: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    for kind, tokenizer in trained.items():
        reference = AutoTokenizer.from_pretrained(tokenizer.directory)
        text = texts["zh"][:300] + texts["en"][:300]
        assert reference(text)["input_ids"] == tokenizer.encode(text), kind
        if kind != "wordpiece":
            messages = [{"role": "user", "content": "你好"}]
            rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert rendered == "<|endoftext|><|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_no_text_is_refused(kind: str) -> None:
    for nothing in ([], [""], ["  \n"]):
        with pytest.raises(UsageError, match="there is none"):
            train_tokenizer(nothing, kind=kind, vocab_size=400)


def test_what_the_texts_raise_is_told_as_it_is() -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield "some text"
        raise UsageError("the file vanished")

    with pytest.raises(UsageError, match="the file vanished"):
        train_tokenizer(broken(), vocab_size=400)
