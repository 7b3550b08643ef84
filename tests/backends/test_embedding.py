"""The embedder against transformers' BERT, mean-pooled; lengths, orders, threads; directories that it cannot use."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from bimo.backends.embedding import Embedder
from bimo.errors import (
    ContextLengthError,
    CorruptModelError,
    EngineError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
)
from bimo.formats.hub import resolve
from bimo.formats.huggingface import is_encoder
from tests.encoders import TEXTS, make_encoder

MIXED = [*TEXTS["zh"], *TEXTS["en"], "", " ", "🦊", "好", "a [SEP] b", "naïve café é", "\0", "水" * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", masked_head=True)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Any:
    with Embedder.load(str(folder), dtype="float32") as embedder:
        yield embedder


def reference(folder: Path, rows: list[list[int]], *, first: bool = False) -> np.ndarray:
    """transformers' BERT, a text at a time; the mean of its tokens, or the first one, in float64."""
    model, found = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), []
    for row in rows:
        with torch.inference_mode():
            hidden = model(torch.tensor([row])).last_hidden_state[0].double()
        found.append(F.normalize(hidden[0] if first else hidden.mean(0), dim=0).numpy())
    return np.stack(found)


def pooled_by(folder: Path, target: Path, *, mode: str, length: int | None = None, kind: str = "Pooling") -> Path:
    """A copy with what sentence-transformers writes beside a model."""
    shutil.copytree(folder, target)
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({
        "word_embedding_dimension": 32, "pooling_mode_cls_token": False, f"pooling_mode_{mode}": True}))  # fmt: skip
    modules = [("", "Transformer"), ("1_Pooling", kind), ("2_Normalize", "Normalize")]
    (target / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules])
    )
    if length:
        (target / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    return target


def test_vectors_are_transformers_mean(folder: Path, embedder: Embedder) -> None:
    found = embedder.embed(MIXED)
    rows = [ids.tolist() for ids in embedder.encode(MIXED)]
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(MIXED), 32)
    assert np.abs(found.vectors - reference(folder, rows)).max() < 1e-5
    assert np.abs(np.linalg.norm(found.vectors, axis=1) - 1).max() < 1e-6
    assert found.num_tokens == sum(map(len, rows)) and found.num_cut == 0
    assert np.linalg.norm(found.vectors[0] - found.vectors[5]) > 0.05


def test_the_first_token_where_the_model_was_trained_so(folder: Path, tmp_path: Path) -> None:
    copy = pooled_by(folder, tmp_path / "cls", mode="cls_token")
    with Embedder.load(str(copy), dtype="float32") as embedder:
        rows = [ids.tolist() for ids in embedder.encode(MIXED)]
        assert embedder.info().pooling == "cls"
        assert np.abs(embedder.embed(MIXED).vectors - reference(folder, rows, first=True)).max() < 1e-5


def test_bfloat16_is_near(folder: Path, embedder: Embedder) -> None:
    with Embedder.load(str(folder), dtype="bfloat16") as rough:
        assert rough.info().dtype == "bfloat16"
        cosines = (rough.embed(MIXED).vectors * embedder.embed(MIXED).vectors).sum(1)
    assert cosines.min() > 0.995


def test_company_and_order_change_nothing(embedder: Embedder) -> None:
    whole = embedder.embed(MIXED * 9).vectors
    for place, text in enumerate(MIXED):
        assert np.abs(embedder.embed([text]).vectors[0] - whole[place]).max() < 1e-5
    turned = embedder.embed(MIXED[::-1]).vectors[::-1]
    assert np.abs(turned - whole[: len(MIXED)]).max() < 1e-5
    assert embedder.embed([]).vectors.shape == (0, 32)


def test_batches_hold_every_row_once_and_little_padding(embedder: Embedder) -> None:
    lengths = np.random.default_rng(0).integers(2, 64, 777)
    rows = [np.ones(length, np.uint32) for length in lengths]
    batches = embedder.batches(rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(777))
    widths = [-(-max(lengths[batch]) // 16) * 16 for batch in batches]
    assert all(len(batch) & (len(batch) - 1) == 0 for batch in batches)
    assert all(len(batch) * width <= 2048 for batch, width in zip(batches, widths, strict=True))
    padded = sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
    assert padded < 1.4 * lengths.sum() and embedder.batches([]) == []


def test_long_texts_are_cut_and_counted_or_refused(folder: Path, tmp_path: Path, embedder: Embedder) -> None:
    long, short = "毛笔用竹管" * 100, "毛笔"
    found = embedder.embed([short, long])
    assert found.num_cut == 1 and found.num_tokens == len(embedder.encode([short])[0]) + 64
    row = embedder.encode([long])[0]
    assert np.abs(found.vectors[1] - reference(folder, [[*row[:63].tolist(), int(row[-1])]])[0]).max() < 1e-5
    with pytest.raises(ContextLengthError, match="502 tokens, the context holds 64"):
        embedder.embed([short, long], too_long="refuse")
    copy = pooled_by(folder, tmp_path / "short", mode="mean_tokens", length=20)
    for context, expected in ((None, 20), (10, 10), (50, 20)):
        with Embedder.load(str(copy), context_length=context) as limited:
            assert limited.info().context_length == expected
            assert limited.embed([long]).num_tokens == expected
    with pytest.raises(UsageError, match="context_length must hold"):
        Embedder.load(str(copy), context_length=2)


def test_prefixes_belong_to_the_text(embedder: Embedder) -> None:
    plain = embedder.embed(["query: 毛笔"]).vectors
    assert np.array_equal(embedder.embed(["毛笔"], prefix="query: ").vectors, plain)
    assert np.abs(embedder.embed(["毛笔"]).vectors - plain).max() > 1e-3


def test_many_threads_at_once(embedder: Embedder) -> None:
    expected = embedder.embed(MIXED).vectors
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = embedder.embed(MIXED[number:] + MIXED[:number]).vectors

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert np.abs(np.roll(found[number], number, 0) - expected).max() < 1e-5


def test_wrong_texts(embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        embedder.embed(["好", "\ud83e"])
    with pytest.raises(UsageError, match="expected text, got NoneType"):
        embedder.embed([None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="list of texts"):
        embedder.embed("一段文字")


def test_a_closed_one_says_so(folder: Path) -> None:
    with Embedder.load(str(folder)) as embedder:
        pass
    with pytest.raises(EngineError, match="closed"):
        embedder.embed(["好"])
    embedder.close()


def test_what_is_no_encoder_is_refused(tiny_model_dir: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(llama\) writes text, embeddings are made by an encoder"):
        Embedder.load(str(tiny_model_dir))
    with pytest.raises(ModelNotFoundError):
        Embedder.load(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="dtype"):
        Embedder.load("minilm", dtype="float31")
    assert is_encoder(folder) and not is_encoder(tiny_model_dir)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"mode": "max_tokens"}, UnsupportedModelError, "vector made of max_tokens"),
        ({"mode": "mean_tokens", "kind": "Dense"}, UnsupportedModelError, "a module 'Dense'"),
    ],
)
def test_vectors_made_otherwise_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Embedder.load(str(pooled_by(folder, tmp_path / "copy", **change)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", b"[1]"),
        ("modules.json", b'{"a": '),
        ("1_Pooling/config.json", b"\xff"),
        ("1_Pooling/config.json", b"[]"),
        ("1_Pooling/config.json", None),
        ("sentence_bert_config.json", b"7"),
        ("model.safetensors", b"\0" * 40),
    ],
)
def test_damaged_files_are_named(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    copy = pooled_by(folder, tmp_path / "copy", mode="mean_tokens", length=20)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(CorruptModelError) as caught:
        Embedder.load(str(copy))
    assert name in str(caught.value)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = make_encoder(tmp_path / "nan")
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"].fill_(torch.nan)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with Embedder.load(str(copy)) as embedder, pytest.raises(EngineError, match="not numbers in"):
        embedder.embed(["好"])


def test_minilm_knows_what_belongs_together() -> None:
    """The real model of the catalog, where it can be fetched."""
    from bimo.errors import DownloadError

    try:
        folder = resolve("minilm")
    except DownloadError as error:
        pytest.skip(f"minilm cannot be fetched: {error}")
    with Embedder.load("minilm") as embedder:
        info = embedder.info()
        assert (info.dimensions, info.context_length, info.num_parameters, info.pooling) == (
            384,
            256,
            22_565_376,
            "mean",
        )
        texts = ["How do I brew tea?", "Steep the leaves in hot water.", "The court adjourned at noon."]
        found = embedder.embed(texts).vectors
        rows = [ids.tolist() for ids in embedder.encode(texts)]
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
    assert np.abs(found - reference(folder, rows)).max() < (1e-5 if info.dtype == "float32" else 0.05)
