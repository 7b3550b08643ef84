"""Token files: documents as ids, one after the other, memory-mapped, so that training reads any part of any corpus in
flat memory.

    folder/tokens.bin     ids, uint16 while they fit, else uint32
           ends.npy       (D,) int64: where each document ends
           ids.txt        where each document came from, one a line
           trained.bin    of examples: 1 for each token that is learned, 0 for those that are only read, uint8
           about.json     number type, counts, the tokenizer's fingerprint; written last, so a folder with it is whole

A document is <|endoftext|> its tokens <|endoftext|>: the first says where it begins (as in generation), the last is
what the model learns to stop with.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.records import Document
from bimo.errors import DataError
from bimo.runtime import cpu_threads
from bimo.tokenizer.bulk import bulk_encoder
from bimo.tokenizer.load import Tokenizer

__all__ = ["EncodedDocument", "EncodedExample", "TokenFile", "encode_documents", "fingerprint", "write_tokens"]

EncodedDocument = tuple[str, Sequence[int] | NDArray[np.uint32]]  # where it came from, its tokens
EncodedExample = tuple[str, Sequence[int], Sequence[int]]  # and for each token 1 where it is learned

BATCH_CHARS = 1 << 16  # handed to a thread at once


@dataclass(frozen=True)
class TokenFile:
    """A finished folder. tokens (N,), ends (D,), trained (N,) or None: all tokens are learned; all mapped."""

    folder: Path
    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    trained: NDArray[np.uint8] | None = None

    @classmethod
    def open(cls, folder: Path) -> TokenFile:
        """Raises DataError when files are missing or do not belong together."""
        mend = "remove the folder and run the same command again"
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            ends = np.load(folder / "ends.npy", mmap_mode="r")
            size = (folder / "tokens.bin").stat().st_size
            count, dtype = int(about["num_tokens"]), np.dtype(about["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a folder of tokens ({error}): {mend}") from None
        if size != count * dtype.itemsize or len(ends) != about["num_documents"] or (len(ends) and ends[-1] != count):
            raise DataError(f"{folder} should have {count} tokens and has {size // dtype.itemsize}: {mend}")
        tokens = np.memmap(folder / "tokens.bin", dtype, "r") if count else np.zeros(0, dtype)
        return cls(folder, tokens, ends, _trained(folder, count, mend) if about.get("trained") else None)

    @staticmethod
    def is_whole(folder: Path, mark: str) -> bool:
        """Whether it is finished, and made with what `mark` stands for."""
        try:
            return bool(json.loads((folder / "about.json").read_text(encoding="utf-8"))["mark"] == mark)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def document_id(self, index: int) -> str:
        """Where a document came from; reads up to its line."""
        with (self.folder / "ids.txt").open(encoding="utf-8") as lines:
            return next(itertools.islice(lines, index, None), "?").rstrip("\n")


def fingerprint(*things: Any) -> str:
    """A short hash of files (by content) and of values."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(thing.read_bytes() if isinstance(thing, Path) else repr(thing).encode())
    return digest.hexdigest()[:16]


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """(id, token ids) of each document, in order; dialogues by the tokenizer's chat template, if it has one.

    A document that happens to contain the text "<|endoftext|>" gets it spelled in ordinary tokens. All cores cut text,
    a few batches ahead of what is taken.
    """
    from bimo.tokenizer.chat import encode_chat

    encode = bulk_encoder(tokenizer)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before, after = np.array(begin, np.uint32), np.array(begin or tokenizer.eos_token_ids[:1], np.uint32)

    def encode_batch(batch: Sequence[Document]) -> list[EncodedDocument]:
        dialogues = [bool(document.messages and tokenizer.chat_template) for document in batch]
        found = iter(encode([document.text for document, talk in zip(batch, dialogues, strict=True) if not talk]))
        encoded: list[EncodedDocument] = []
        for document, talk in zip(batch, dialogues, strict=True):
            if talk:
                messages = [message._asdict() for message in document.messages]
                ids = np.array(encode_chat(tokenizer, messages, add_generation_prompt=False), np.uint32)
            else:
                ids = np.concatenate((before, next(found)))
            encoded.append((document.id, np.concatenate((ids, after))))
        return encoded

    threads, waiting = cpu_threads(), deque[Future[list[EncodedDocument]]]()
    with ThreadPoolExecutor(threads, "tokenise") as pool:
        for batch in _batches(documents):
            waiting.append(pool.submit(encode_batch, batch))
            if len(waiting) > threads + 1:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """In order, of BATCH_CHARS characters and more: by size and not by number, as some are books."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 1  # empty ones add up too
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _trained(folder: Path, count: int, mend: str) -> NDArray[np.uint8]:
    file = folder / "trained.bin"
    if not file.is_file() or file.stat().st_size != count:
        raise DataError(f"{file} should say of {count} tokens which are learned, and does not: {mend}")
    return np.memmap(file, np.uint8, "r") if count else np.zeros(0, np.uint8)


def write_tokens(
    folder: Path, encoded: Iterable[EncodedDocument | EncodedExample], *, vocab_size: int, mark: str
) -> TokenFile:
    """Write a token folder; it appears whole or not at all. `mark`: what it was made from (see `fingerprint`)."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    ends, total, learned = array("q"), 0, 0
    try:
        with (
            (partial / "tokens.bin").open("wb") as tokens,
            (partial / "ids.txt").open("w", encoding="utf-8") as names,
            (partial / "trained.bin").open("wb") as trained,
        ):
            for name, ids, *mask in encoded:
                tokens.write(np.asarray(ids, dtype).tobytes())
                names.write(name.replace("\n", " ") + "\n")
                if mask:
                    learned += trained.write(np.asarray(mask[0], np.uint8).tobytes())
                total += len(ids)
                ends.append(total)
            tokens.flush()
            os.fsync(tokens.fileno())
        if not learned:
            (partial / "trained.bin").unlink()
        elif learned != total:
            raise DataError(f"{learned} of {total} tokens say whether they are learned: either all do or none")
        np.save(partial / "ends.npy", np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))
        about = {"dtype": dtype.name, "num_tokens": total, "num_documents": len(ends), "mark": mark}
        about |= {"trained": True} if learned else {}
        (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"tokens could not be written to {folder} ({error.strerror}): free some space") from error
    return TokenFile.open(folder)
