"""Text <-> ids: equality with the `tokenizers` library, exact bytes, what ends an answer, and broken directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.errors import CorruptModelError, ModelNotFoundError, UsageError
from bimo.tokenizer.load import Decoding, Tokenizer, byte_level_alphabet
from tests.tokenizer.tiny import SAMPLES


@pytest.mark.parametrize("text", SAMPLES)
def test_encode_and_decode_agree_with_the_library(tokenizer: Tokenizer, text: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=150)
def test_any_text_survives(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        if any(name in text for name in ("<0x", "<s>", "</s>", "<unk>", "<|", "▁")):
            continue
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, 430), max_size=40))
@settings(deadline=None, max_examples=200)
def test_decoding_any_ids_agrees_with_the_library(byte_level: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        known = [i for i in ids if i < byte_level.vocab_size]
        assert byte_level.decode(ids, skip) == byte_level.backend.decode(known, skip_special_tokens=skip)


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    for text in SAMPLES:
        joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text))
        assert joined.decode() == (" " * tokenizer.decoding.strip + text if text else "")


def test_token_bytes_of_single_tokens(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    newline = sentencepiece.backend.token_to_id("<0x0A>")
    assert sentencepiece.token_bytes(newline) == b"\n"
    assert sentencepiece.token_bytes(1) == b""
    assert sentencepiece.token_bytes(1, skip_special_tokens=False) == b"<s>"
    half = byte_level.encode("好")[0]
    assert byte_level.token_bytes(half) == "好".encode()[: len(byte_level.token_bytes(half))]
    assert byte_level.token_text(2) == "<|im_end|>"
    assert byte_level.token_bytes(-1) == byte_level.token_bytes(10**9) == b""
    assert byte_level.decode([10**9, -1]) == ""


def test_the_byte_alphabet_is_a_bijection() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10


def test_special_tokens_are_left_out_of_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>hi<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert byte_level.decode(ids) == "hi"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_smollm2(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_ids[0]) == (1, 2)
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    for text in SAMPLES:
        assert smollm2.decode(smollm2.encode(text)) == text


def test_a_large_text(byte_level: Tokenizer) -> None:
    text = "笔墨 paper 🎉 " * 30_000
    assert byte_level.decode(byte_level.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "ok \udc00 end", "\ud83d"])
def test_lone_surrogates_are_a_usage_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="lone surrogate U\\+"):
        tokenizer.encode(text)


@pytest.fixture
def copy(byte_level: Tokenizer, tmp_path: Path) -> Path:
    return Path(shutil.copytree(byte_level.directory, tmp_path / "model"))


def write(file: Path, **values: object) -> None:
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | values), encoding="utf-8")


def test_ends_come_from_every_place_that_names_them(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    assert Tokenizer.from_directory(copy).eos_token_ids == (2,)  # eos_token of tokenizer_config.json
    write(copy / "config.json", eos_token_id=[0, 2])
    assert Tokenizer.from_directory(copy).eos_token_ids == (0, 2)
    write(copy / "generation_config.json", eos_token_id=5)
    assert Tokenizer.from_directory(copy).eos_token_ids == (5, 0, 2)
    write(copy / "generation_config.json", eos_token_id=10**6)  # no such token
    assert Tokenizer.from_directory(copy).eos_token_ids == (0, 2)


def test_the_end_of_turn_of_the_template_ends_an_answer(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    write(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert Tokenizer.from_directory(copy).eos_token_ids == (0,)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>", encoding="utf-8")
    tokenizer = Tokenizer.from_directory(copy)
    assert tokenizer.eos_token_ids == (0, 2)
    assert tokenizer.chat_template == "{{ messages[0].content }}<|im_end|>"


def test_templates_in_tokenizer_config(copy: Path) -> None:
    assert Tokenizer.from_directory(copy).chat_template is None
    write(copy / "tokenizer_config.json", chat_template="single 模板")
    assert Tokenizer.from_directory(copy).chat_template == "single 模板"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write(copy / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_directory(copy).chat_template == "d"


def test_tokens_the_config_calls_special_become_so(copy: Path) -> None:
    plain = Tokenizer.from_directory(copy)
    think = plain.encode("<think>")
    assert plain.decode(think) == "<think>"
    write(copy / "tokenizer_config.json", additional_special_tokens=["<think>", {"content": "<none such>"}])
    special = Tokenizer.from_directory(copy)
    assert special.encode("<think>") == think
    assert special.decode(think) == ""
    assert special.vocab_size == plain.vocab_size


def test_broken_directories_say_what_is_wrong(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        Tokenizer.from_directory(tmp_path / "nowhere")
    (copy / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptModelError, match=r"generation_config\.json is not valid JSON"):
        Tokenizer.from_directory(copy)
    (copy / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CorruptModelError, match="expected an object"):
        Tokenizer.from_directory(copy)
    whole = (copy / "tokenizer.json").read_text(encoding="utf-8")
    (copy / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(CorruptModelError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.from_directory(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CorruptModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_directory(copy)


def test_a_decoder_that_looks_at_neighbours_is_not_misread() -> None:
    assert Decoding.parse({"type": "WordPiece", "prefix": "##", "cleanup": True}).kind == "other"
    assert Decoding.parse(None).kind == "other"
    strip_first = {
        "type": "Sequence",
        "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}],
    }
    assert Decoding.parse(strip_first).kind == "other"  # before Fuse it strips every token


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"one": 0},
        {"one": 0, "二": 1, "three": 2},
        {"one": 0, "二": 5},  # ids without a word between
        {"one": 3, "二": 4},
        {"one": 0, "二": 2, "three": 1, "four": 900},
    ],
    ids=str,
)
@pytest.mark.parametrize("added", [[], ["<|end|>"], ["one", "<|结束|>"]], ids=str)
def test_ids_may_have_gaps(words: dict[str, int], added: list[str], tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="one"))
    backend.add_special_tokens(added)
    tokenizer = Tokenizer(backend, directory=tmp_path)
    vocab = backend.get_vocab(with_added_tokens=True)
    assert tokenizer.vocab_size == max(vocab.values(), default=-1) + 1
    spellings = {text: i for i in range(-1, tokenizer.vocab_size + 1) if (text := tokenizer.token_spelling(i))}
    assert spellings == vocab


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_two_files_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    """As GPT-2 was released, and as transformers kept it before there was a tokenizer.json."""
    vocabulary = [*byte_level_alphabet(), "Ġt", "he", "Ġthe", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    (tmp_path / names[0]).write_text(json.dumps(ids), encoding="utf-8")
    (tmp_path / names[1]).write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")
    if names[0] == "vocab.json":
        with pytest.raises(CorruptModelError, match=r"no tokenizer\.json"):  # other families have files of these names
            Tokenizer.from_directory(tmp_path)
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = "see the 猫's  tail\n"
    assert ids["Ġthe"] in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>") == [ids["<|endoftext|>"]]
    (tmp_path / names[1]).write_bytes(b"\xff\xfe broken")
    with pytest.raises(CorruptModelError, match="not a readable tokenizer"):
        Tokenizer.from_directory(tmp_path)
