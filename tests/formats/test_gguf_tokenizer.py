"""Tokenizers out of GGUF metadata and back: compared with transformers' conversion and with known ids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf, tokenizer_to_gguf
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import save_tokenizer, train_tokenizer
from tests.tokenizer.tiny import SAMPLES, byte_level_metadata, load, sentencepiece_metadata


def write_gguf_file(metadata: dict[str, Any], file: Path) -> None:
    """A GGUF file of nothing but metadata."""
    import gguf

    writer = gguf.GGUFWriter(str(file), metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def transformers_conversion(metadata: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    write_gguf_file(metadata, folder / "model.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken", "gpt-4o"])
def test_byte_level_equals_transformers_conversion(tmp_path: Path, pre: str) -> None:
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    ours, theirs = load(metadata, tmp_path / "ours"), transformers_conversion(metadata, tmp_path / "theirs")
    for text in SAMPLES:
        if pre == "qwen2" and text.startswith("a\u0301"):
            continue  # Qwen's own tokenizer composes characters first; see the next test
        if pre in ("llama-bpe", "tekken"):
            theirs.backend_tokenizer.model.ignore_merges = True  # as in Llama 3's own tokenizer.json
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), (pre, text)
    marked = "<|im_start|>问<|im_end|><think>"
    assert ours.encode(marked) == theirs.encode(marked, add_special_tokens=False)


def test_qwen_composes_characters(tmp_path: Path) -> None:
    tokenizer = load(byte_level_metadata() | {"tokenizer.ggml.pre": "qwen2"}, tmp_path)
    assert tokenizer.encode("a\u0301") == tokenizer.encode("á")


def test_smollm_splits_digits(tmp_path: Path) -> None:
    tokenizer = load(byte_level_metadata(), tmp_path)
    assert len(tokenizer.encode("2024")) == 4
    assert [tokenizer.token_text(i) for i in tokenizer.encode("x 12")] == ["x", " ", "1", "2"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_transformers_conversion(tmp_path: Path, prefix: bool) -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": prefix}
    ours, theirs = load(metadata, tmp_path / "ours"), transformers_conversion(metadata, tmp_path / "theirs")
    for text in SAMPLES:
        if prefix and text.startswith(" "):
            continue  # transformers then adds no space of its own; llama.cpp and Llama 2's own tokenizer.json do
        if not prefix and not text.startswith(" "):
            continue  # transformers adds the space whatever the file says
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text


def test_sentencepiece_picks_the_best_scores(tmp_path: Path) -> None:
    """Greedy by score, the leftmost first of equals: SentencePiece's rule, written out plainly."""
    metadata = sentencepiece_metadata()
    tokenizer = load(metadata, tmp_path)
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))

    def plain(text: str) -> list[str]:
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
            if not pairs:
                break
            _, i = min(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        out: list[str] = []
        for piece in pieces:
            out += [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
        return out

    for text in SAMPLES:
        if text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert [tokenizer.token_spelling(i) for i in ids] == plain(text), text


def test_bos_follows_the_file(tmp_path: Path) -> None:
    spm, byte = sentencepiece_metadata(), byte_level_metadata()
    add = "tokenizer.ggml.add_bos_token"
    assert load(spm, tmp_path / "a").encode("你好")[0] == 1
    assert load(spm | {add: False}, tmp_path / "b").encode("你好")[0] != 1
    assert load(byte, tmp_path / "c").encode("你好")[0] != 1
    assert load(byte | {add: True}, tmp_path / "d").encode("你好")[0] == 1
    both = load(spm | {"tokenizer.ggml.add_eos_token": True}, tmp_path / "e")
    assert both.encode("你好")[-1] == 2
    assert both.encode("你好", add_special_tokens=False)[-1] != 2


def test_the_files_that_are_written(tmp_path: Path) -> None:
    template = "{{ messages }}<|im_end|> 模板"
    tokenizer = load(byte_level_metadata() | {"tokenizer.chat_template": template}, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0]}  # <|endoftext|> ends an answer as well
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.chat_template == template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and config["model_max_length"] == 512
    assert tokenizer.special_ids == {0, 1, 2}


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, metadata in (("byte", byte_level_metadata()), ("spm", sentencepiece_metadata())):
        ours = load(metadata, tmp_path / name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in SAMPLES:
            assert theirs.encode(text) == ours.encode(text), (name, text)
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text


def test_end_tokens_the_file_names(tmp_path: Path) -> None:
    metadata = byte_level_metadata(("<|eot_id|>",))
    eot = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert load(metadata, tmp_path / "a").eos_token_ids == (2, eot, 0)
    named = metadata | {"tokenizer.ggml.eot_token_id": 5}
    assert load(named, tmp_path / "b").eos_token_ids == (2, 5, eot, 0)


def test_padding_is_nobodys_token(tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    padded = metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], f"[PAD{size}]", f"[PAD{size + 1}]"],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 5, 5],
    }
    assert load(padded, tmp_path).vocab_size == size


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, UnsupportedModelError, "pre-tokenizer is 'klingon'"),
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedModelError, "of the kind 'rwkv'"),
        ({"tokenizer.ggml.model": None}, UnsupportedModelError, "of the kind None"),
        ({"tokenizer.ggml.tokens": []}, CorruptModelError, r"no tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, CorruptModelError, "but 1 token types"),
        ({"tokenizer.ggml.merges": ["你 好"]}, CorruptModelError, "contradicts itself"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, CorruptModelError, "neither scores nor"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        tokenizer_from_gguf(byte_level_metadata() | changes, tmp_path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loads_and_survives_the_way_back(tmp_path: Path, name: str) -> None:
    tokenizer = load(byte_level_metadata() | {"tokenizer.ggml.pre": name}, tmp_path)
    for text in SAMPLES:
        composed = PRE_TOKENIZERS[name].nfc and text.startswith("a\u0301")
        assert composed or tokenizer.decode(tokenizer.encode(text)) == text
    back = tokenizer_to_gguf(tmp_path)["tokenizer.ggml.pre"]
    assert PRE_TOKENIZERS[back] == PRE_TOKENIZERS[name]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    metadata = byte_level_metadata() if kind == "byte_level" else sentencepiece_metadata()
    first = load(metadata | {"tokenizer.chat_template": "模板"}, tmp_path / "first")
    back = tokenizer_to_gguf(tmp_path / "first")
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id"):
        assert back[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    assert back["tokenizer.chat_template"] == "模板"
    second = load(back, tmp_path / "second")
    for text in SAMPLES:
        assert second.encode(text) == first.encode(text)
    assert second.eos_token_ids == first.eos_token_ids
    assert second.special_ids == first.special_ids


def test_smollm2_there_and_back(smollm2_dir: Path, tmp_path: Path) -> None:
    metadata = tokenizer_to_gguf(smollm2_dir)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(metadata["tokenizer.ggml.merges"]) == 48900
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert metadata["tokenizer.ggml.token_type"][:18] == [3] * 17 + [1]
    again, first = load(metadata, tmp_path), Tokenizer.from_directory(smollm2_dir)
    for text in SAMPLES:
        assert again.encode(text) == first.encode(text)


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="BPE"):
        tokenizer_to_gguf(tmp_path)
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="no name"):
        tokenizer_to_gguf(tmp_path)


def test_a_tokenizer_that_bimo_has_learned_there_and_back(tmp_path: Path) -> None:
    texts = [*SAMPLES, "从前有一个小小的模型，它会算 12 加 34。" * 3, "Once upon a time there's a tiny model.\n"]
    save_tokenizer(train_tokenizer(texts, vocab_size=600), tmp_path / "own")
    metadata = tokenizer_to_gguf(tmp_path / "own")
    (tmp_path / "back").mkdir()
    tokenizer_from_gguf(metadata, tmp_path / "back")
    own, back = (Tokenizer.from_directory(tmp_path / name) for name in ("own", "back"))
    for text in texts:
        assert back.encode(text) == own.encode(text)
    assert back.chat_template == own.chat_template
