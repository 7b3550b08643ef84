"""Text <-> token ids, for every model directory bimo serves or trains.

    tokenizer = Tokenizer.from_directory(path)
    ids = tokenizer.encode("你好")          # -> list[int]
    tokenizer.decode(ids)                   # -> "你好"

The work is done by the Rust `tokenizers` library on `tokenizer.json`; this file adds what that library does not
know: which ids end an answer, which chat template belongs to the model, and the exact bytes of every token. Bytes,
not strings, are what a stream, `logprobs[].bytes` and a grammar need, since one token may be half a character.

`decode` is defined by those bytes: join them, read them as UTF-8, U+FFFD for what is malformed. For byte-level BPE
that is what `tokenizers` does. For SentencePiece with byte fallback it differs on malformed bytes only (there
`tokenizers` turns a whole run of byte tokens into U+FFFD for one wrong byte, which no stream could foresee).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from bimo.errors import CorruptModelError, ModelNotFoundError, UsageError

__all__ = ["END_OF_TURN_TOKENS", "Decoding", "Tokenizer", "byte_level_alphabet", "check_text"]

# Spellings of "the turn is over" in the templates of the families bimo reads.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "</s>",
)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes as printable characters: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + place): byte for place, byte in enumerate(rest)})
    return table


@dataclass(frozen=True)
class Decoding:
    """How a token's spelling becomes bytes; read from the `decoder` part of tokenizer.json.

    kind: "byte_level" (GPT-2's alphabet), "pieces" (SentencePiece: replacements, then `<0xNN>` as bytes), or
          "other" (a decoder whose output depends on the neighbours; such text cannot be streamed).
    strip: how many leading spaces belong to the tokenizer and not to the text.
    """

    kind: Literal["byte_level", "pieces", "other"]
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0

    @classmethod
    def parse(cls, decoder: dict[str, Any] | None) -> Decoding:
        """Read the decoder; anything not understood completely is "other"."""
        other = cls("other")
        if decoder is None:
            return other
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls("byte_level")
        replacements: list[tuple[str, str]] = []
        byte_fallback, fused, strip = False, False, 0
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if not fused:
                    replacements.append((pattern, content))
                case {"type": "ByteFallback"} if not fused:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused and not strip:
                    strip = start
                case _:
                    return other
        return cls("pieces", tuple(replacements), byte_fallback, strip) if fused else other

    def to_bytes(self, text: str, alphabet: dict[str, int]) -> bytes:
        """Bytes of a token spelled `text`."""
        if self.kind == "byte_level":
            try:
                return bytes([alphabet[char] for char in text])
            except KeyError:  # an added token, written plainly
                return text.encode("utf-8", "replace")
        for old, new in self.replacements:
            text = text.replace(old, new)
        if self.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                pass
        return text.encode("utf-8", "replace")


class Tokenizer:
    """A model directory's tokenizer. Immutable after construction, safe to share between threads.

    backend            the `tokenizers.Tokenizer` itself
    vocab_size         ids are 0 <= id < vocab_size (added tokens included); the model's logits may be wider
    bos_token_id       begin-of-sequence id, or None
    eos_token_ids      ids that end an answer, the most usual first: end of sequence and end of turn
    special_ids        ids of control tokens, which `decode` leaves out
    special_tokens     "bos_token", "eos_token", ... -> their text, as templates want them
    chat_template      jinja2 source, or None for a base model
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        directory: Path,
        special_tokens: dict[str, str] | None = None,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.directory = directory
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.vocab_size = _vocab_size(backend)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(i for i in eos_token_ids if 0 <= i < self.vocab_size))
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self.decoding = Decoding.parse(decoder)
        self._alphabet = byte_level_alphabet()
        self._bytes: list[bytes | None] = [None] * self.vocab_size  # found when asked for: all take 50 ms

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load `tokenizer.json` and what belongs to it.

        Raises ModelNotFoundError when there is no such folder, CorruptModelError when a file is missing or broken.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelNotFoundError(str(path), [], "there is no such folder")
        config = _read_json(directory / "tokenizer_config.json")
        backend = _read_backend(directory, config)
        generation = _read_json(directory / "generation_config.json")
        model = _read_json(directory / "config.json")
        special_tokens = _mark_special(backend, config)
        template = _read_template(directory, config)
        bos = special_tokens.get("bos_token")
        bos_ids = [backend.token_to_id(bos)] if bos else []
        bos_ids += [*_ids(generation.get("bos_token_id")), *_ids(model.get("bos_token_id"))]
        bos_token_id = next((i for i in bos_ids if i is not None), None)
        eos_ids = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
        added = backend.get_added_tokens_decoder()
        names = [special_tokens.get("eos_token", "")]
        if template:
            names += [name for name in END_OF_TURN_TOKENS if name in template]
        for name in filter(None, names):
            token_id = backend.token_to_id(name)
            if token_id is not None and token_id in added:
                eos_ids.append(token_id)
        return cls(
            backend,
            directory=directory,
            special_tokens=special_tokens,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_ids,
            chat_template=template,
        )

    def ending_with(self, token_id: int) -> Tokenizer:
        """A tokenizer whose `encode` puts this token behind every text, as an encoder-decoder's sources end; itself
        where it does so already (T5, Marian, BART), else nothing but this token is added."""
        if self.encode("")[-1:] == [token_id]:
            return self
        backend, name = tokenizers.Tokenizer.from_str(self.backend.to_str()), self.token_spelling(token_id)
        if not name:
            raise CorruptModelError(
                f"{self.directory} has no token for the end, id {token_id}: fetch or convert the model again"
            )
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=["$A", name], special_tokens=[(name, token_id)]
        )
        return Tokenizer(
            backend,
            directory=self.directory,
            special_tokens=self.special_tokens,
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
            chat_template=self.chat_template,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also those the model wants around it (often a BOS).

        Raises UsageError for text that is not valid Unicode (lone surrogates).
        """
        check_text(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary are an empty text, malformed UTF-8 is U+FFFD."""
        if self.decoding.kind == "other":
            known = [i for i in ids if 0 <= i < self.vocab_size]
            return self.backend.decode(known, skip_special_tokens=skip_special_tokens)
        hidden = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self._bytes_of(i) for i in ids if 0 <= i < self.vocab_size and i not in hidden)
        text = data.decode("utf-8", "replace")
        for _ in range(self.decoding.strip):
            text = text.removeprefix(" ")
        return text

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Exact bytes of one token, b"" for a control token (unless asked for) or an id without a token."""
        if not 0 <= token_id < self.vocab_size or (skip_special_tokens and token_id in self.special_ids):
            return b""
        return self._bytes_of(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        found = self._bytes[token_id]
        if found is None:
            if self.decoding.kind == "other":
                found = self.backend.decode([token_id], skip_special_tokens=False).encode()
            else:
                found = self.decoding.to_bytes(self.token_spelling(token_id), self._alphabet)
            self._bytes[token_id] = found
        return found

    def token_text(self, token_id: int) -> str:
        """One token for people to read, control tokens too; half a character shows as U+FFFD."""
        return self.token_bytes(token_id, skip_special_tokens=False).decode("utf-8", "replace")

    def token_spelling(self, token_id: int) -> str:
        """The token as tokenizer.json spells it ("Ġthe", "▁the", "<0x0A>")."""
        return (self.backend.id_to_token(token_id) or "") if 0 <= token_id < self.vocab_size else ""

    def special_text(self, token_id: int | None) -> str:
        """A control token's text, "" for None."""
        return "" if token_id is None else self.token_spelling(token_id)


def _vocab_size(backend: tokenizers.Tokenizer) -> int:
    """One more than the highest id. Without a look at every word, which takes 25 ms, where ids are dense: as many as
    there are words, the last of them there, and none of the thousand after it."""
    size, added = backend.get_vocab_size(with_added_tokens=False), backend.get_added_tokens_decoder()
    if size and backend.id_to_token(size - 1) is not None:
        beyond = (backend.id_to_token(i) for i in range(size, size + 1000) if i not in added)
        if all(text is None for text in beyond):
            return max(size, *(i + 1 for i in added), 0)
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _read_backend(directory: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """tokenizer.json, or the two files that GPT-2 was released with: a vocabulary and its merges."""
    file = directory / "tokenizer.json"
    is_gpt2 = str(config.get("tokenizer_class", "")).startswith("GPT2Tokenizer")
    names = [("encoder.json", "vocab.bpe"), *([("vocab.json", "merges.txt")] if is_gpt2 else [])]
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))  # unlike from_str, lets other threads run meanwhile
        for vocabulary, merges in names:
            file = directory / vocabulary
            if file.is_file() and (directory / merges).is_file():
                model = tokenizers.models.BPE.from_file(str(file), str(directory / merges))
                return _gpt2_backend(model, add_prefix_space=bool(config.get("add_prefix_space")))
    except Exception as error:  # the Rust library raises bare Exception
        raise CorruptModelError(f"{file} is not a readable tokenizer ({error}): fetch the model again") from error
    raise CorruptModelError(
        f"{directory} has no tokenizer.json: a model directory needs one; fetch or convert the model again"
    )


def _gpt2_backend(model: tokenizers.models.BPE, *, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """As GPT-2 cuts text: words by its own regular expression, then bytes."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend


def check_text(text: str, param: str | None = None) -> None:
    """UsageError unless `text` can be written as UTF-8."""
    if not isinstance(text, str):
        raise UsageError(f"expected text, got {type(text).__name__}", param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send both halves of the pair, or remove it",
            param,
        ) from None


def _special_text(value: Any) -> str | None:
    """tokenizer_config.json writes a special token as text or as {"content": text, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_json(file: Path) -> dict[str, Any]:
    """An optional JSON object; absent is empty, broken is an error."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptModelError(f"{file} is not valid JSON ({error}): fetch the model again") from error
    if not isinstance(value, dict):
        raise CorruptModelError(f"{file} holds {type(value).__name__}, expected an object: fetch the model again")
    return value


def _ids(value: Any) -> list[int]:
    """`eos_token_id` is an int, a list of them, or absent."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _mark_special(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Make the tokens tokenizer_config.json calls special so in the backend, as transformers does; return the named.

    Only tokens that have an id already: a new id would lie outside the model's embedding.
    """
    values = {key: _special_text(value) for key, value in config.items() if key.endswith("_token")}
    named = {key: text for key, text in values.items() if text}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    texts = [*named.values(), *(text for value in extra if (text := _special_text(value)))]
    declared = {
        value["content"]: value
        for value in (config.get("added_tokens_decoder") or {}).values()
        if isinstance(value, dict) and isinstance(value.get("content"), str)
    }
    texts += [text for text, value in declared.items() if value.get("special")]
    already = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [t for t in dict.fromkeys(texts) if t not in already and backend.token_to_id(t) is not None]
    if missing:
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])
    return {key: text for key, text in named.items() if backend.token_to_id(text) is not None}


def _read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json (a string, or a list of named ones)."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptModelError(f"{file} is not UTF-8 text ({error}): fetch the model again") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None
