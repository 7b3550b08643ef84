"""Tokenizers between GGUF metadata and the Hugging Face layout.

    tokenizer_from_gguf(metadata, directory)    writes tokenizer.json, tokenizer_config.json, chat_template.jinja,
                                                generation_config.json
    tokenizer_to_gguf(directory) -> dict        the `tokenizer.*` metadata of a model directory

GGUF names a tokenizer by `tokenizer.ggml.model` ("gpt2": byte-level BPE; "llama": SentencePiece BPE with scores and
byte fallback) and, for the first, by the name of its pre-tokenizer in `tokenizer.ggml.pre`. That name stands for
regular expressions which the file does not hold: `PRE_TOKENIZERS` is the table. A name that is not in it is an error,
never a guess, because a wrong split gives a model that is a little stupid and nobody knows why.

Sources: the GGUF specification (ggml docs/gguf.md), llama.cpp's `llama-vocab.cpp` for what the names mean, and each
family's own tokenizer.json for the expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.tokenizer.load import END_OF_TURN_TOKENS, Tokenizer

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "tokenizer_from_gguf", "tokenizer_to_gguf"]

ANY_OF_LENGTH = re.compile(r"\[\\s\\S\]\{1,\d{2,}\}")  # "[\s\S]{1,100}"
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end an answer whatever the file's own eos says, and the key that names each more directly.
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
_GPT4O = (
    rf"{_CASED}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE: `splits` in order, each isolating its matches.

    nfc: whether text is composed first. whole_words: a piece that is a token as it stands is not merged
    (`ignore_merges`).
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False


_BYTE_LEVEL = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), whole_words=True)
_QWEN = PreTokenizer((_QWEN2,), nfc=True)
_O200K = PreTokenizer((_GPT4O,))
_PUNCTUATED = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _PUNCTUATED,
    "gpt-2": _BYTE_LEVEL,
    "gpt2": _BYTE_LEVEL,
    "phi-2": _BYTE_LEVEL,
    "mpt": _BYTE_LEVEL,
    "olmo": _BYTE_LEVEL,
    "jais": _BYTE_LEVEL,
    "exaone4": _BYTE_LEVEL,
    "trillion": _BYTE_LEVEL,
    "gigachat": _BYTE_LEVEL,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "falcon-h1": _LLAMA_BPE,
    "pixtral": _LLAMA_BPE,
    "midm-2.0": _LLAMA_BPE,
    "lfm2": _LLAMA_BPE,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "glm4": PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "megrez": _QWEN,
    "stablelm2": PreTokenizer((_QWEN2,)),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True),
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "bloom": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write a model directory's tokenizer files from GGUF metadata (key -> value, lists as lists).

    Raises UnsupportedModelError for a tokenizer or pre-tokenizer bimo has no rules for, CorruptModelError when the
    metadata contradicts itself.
    """
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = ggml.get("model")
    texts = ggml.get("tokens")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"the GGUF file has a tokenizer of the kind {kind!r}; bimo reads gpt2 (byte-level BPE) and llama "
            "(SentencePiece): take a Hugging Face directory of the same model instead"
        )
    if not isinstance(texts, list) or not texts:
        raise CorruptModelError("the GGUF file has no tokenizer.ggml.tokens: fetch it again")
    types = ggml.get("token_type") or [NORMAL] * len(texts)
    if len(types) != len(texts):
        raise CorruptModelError(f"the GGUF file has {len(texts)} tokens but {len(types)} token types: fetch it again")
    # A vocabulary padded up to the embedding's size has fillers named so; they are nobody's tokens.
    vocab = {t: i for i, t in enumerate(texts) if not (types[i] == UNUSED and t == f"[PAD{i}]")}
    try:
        backend = _byte_level(ggml, vocab) if kind == "gpt2" else _sentencepiece(ggml, vocab, types)
    except (UnsupportedModelError, CorruptModelError):
        raise
    except Exception as error:  # the Rust library raises bare Exception, for instance for a merge without a token
        raise CorruptModelError(f"the GGUF file's tokenizer contradicts itself ({error}): fetch it again") from error
    added = [
        AddedToken(text, special=types[i] in (CONTROL, UNKNOWN), normalized=False)
        for text, i in vocab.items()
        if text and types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    special = {
        name: texts[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(i := ggml.get(f"{key}_token_id"), int) and 0 <= i < len(texts)
    }
    # SentencePiece models begin with BOS unless the file says otherwise; byte-level ones do not (llama.cpp's rule).
    add_bos = bool(ggml.get("add_bos_token", kind == "llama" or ggml.get("pre") in ("llama-bpe", "tekken")))
    add_eos = bool(ggml.get("add_eos_token", False))
    _set_template(backend, special.get("bos") if add_bos else None, special.get("eos") if add_eos else None)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_compact(backend), encoding="utf-8")
    config: dict[str, Any] = {f"{name}_token": text for name, text in special.items()}
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos, "clean_up_tokenization_spaces": False}
    if isinstance(length := metadata.get(f"{metadata.get('general.architecture')}.context_length"), int):
        config["model_max_length"] = length
    # The generic class: transformers then takes tokenizer.json as it stands instead of rebuilding it by family.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(directory / "tokenizer_config.json", config)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str) and template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    generation: dict[str, Any] = {}
    if isinstance(ggml.get("bos_token_id"), int):
        generation["bos_token_id"] = ggml["bos_token_id"]
    if eos := _eos_ids(ggml, vocab, types):
        generation["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    if isinstance(ggml.get("padding_token_id"), int):
        generation["pad_token_id"] = ggml["padding_token_id"]
    _write_json(directory / "generation_config.json", generation)


def _eos_ids(ggml: Mapping[str, Any], vocab: Mapping[str, int], types: list[int]) -> list[int]:
    """Ids that end an answer: those the file names, then control tokens known to mean it."""
    ids = [ggml[key] for key in EOS_KEYS if isinstance(ggml.get(key), int) and 0 <= ggml[key] < len(types)]
    ids += [vocab[text] for text in END_OF_TURN_TOKENS if text in vocab and types[vocab[text]] == CONTROL]
    return list(dict.fromkeys(ids))


def _merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """ "a b" -> ("a", "b"); the first character may itself be a space."""
    pairs = []
    for line in lines:
        place = line.find(" ", 1)
        pairs.append((line[:place], line[place + 1 :]))
    return pairs


def _byte_level(ggml: Mapping[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    name = ggml.get("pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedModelError(
            f"the GGUF file's pre-tokenizer is {name!r}, which bimo has no rules for (known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}): take a Hugging Face directory of the same model instead"
        )
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(ggml.get("merges") or []), ignore_merges=pre.whole_words)
    )
    prefix = bool(ggml.get("add_space_prefix", False))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False))
    if pre.splits[-1] == _GPT2:  # the library has this one built in, in fast code
        steps[-2:] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(ggml: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece BPE as Llama-2's own tokenizer.json spells it: spaces are "▁", one of them in front."""
    lines = ggml.get("merges")
    scores: list[float] = ggml.get("scores") or []
    if not lines and len(scores) != len(types):
        raise CorruptModelError("the GGUF file's SentencePiece tokenizer has neither scores nor merges: fetch it again")
    unknown = next((text for text, i in vocab.items() if types[i] == UNKNOWN), None)
    if unknown is None and isinstance(i := ggml.get("unknown_token_id"), int):
        unknown = next((text for text, place in vocab.items() if place == i), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(lines) if lines else _merges_from_scores(vocab, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(ggml.get("add_space_prefix", True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as a list that is every split, best union first."""
    pieces = {text: i for text, i in vocab.items() if types[i] == NORMAL}
    merges: list[tuple[float, int, int, str, str]] = []
    for text, i in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[i], pieces[left], pieces[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _set_template(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """BOS and EOS around every text that is encoded with special tokens."""
    around = [text for text in (bos, eos) if text]
    byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    offsets = processors.ByteLevel(trim_offsets=False) if byte_level else None
    if not around:
        if offsets is not None:
            backend.post_processor = offsets
        return
    single = ([bos] if bos else []) + ["$A"] + ([eos] if eos else [])
    pair = single + ([f"{bos}:1"] if bos else []) + ["$B:1"] + ([f"{eos}:1"] if eos else [])
    ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys(around)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _compact(backend: tokenizers.Tokenizer) -> str:
    """Its JSON without white space, and with merges as "a b" where no piece has a space itself: as `tokenizers` reads
    it in half the time (65 ms instead of 130 for 49,152 words), and with it starts every model."""
    state = json.loads(backend.to_str())
    merges = state["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge):
        state["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(state, ensure_ascii=False, separators=(",", ":"))


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# --- Hugging Face -> GGUF ------------------------------------------------------------------------------------------


def tokenizer_to_gguf(directory: Path) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model directory: str, bool, int, and lists of str, int or float.

    Ids without a token become unused ones. Raises UnsupportedModelError for a tokenizer GGUF has no words for.
    """
    tokenizer = Tokenizer.from_directory(directory)
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(f"the tokenizer is {model['type']}; GGUF export knows BPE only")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    spellings = [tokenizer.token_spelling(i) for i in range(tokenizer.vocab_size)]
    texts = [text or f"[PAD{i}]" for i, text in enumerate(spellings)]
    types = [NORMAL if text else UNUSED for text in spellings]
    for i, token in tokenizer.backend.get_added_tokens_decoder().items():
        types[i] = CONTROL if token.special else USER_DEFINED
    out: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    if tokenizer.decoding.kind == "byte_level":
        out["tokenizer.ggml.model"] = "gpt2"
        out["tokenizer.ggml.pre"] = _pre_tokenizer_name(state)
        out["tokenizer.ggml.merges"] = merges
        out["tokenizer.ggml.add_space_prefix"] = _finds(state["pre_tokenizer"], "add_prefix_space", True)
    elif tokenizer.decoding.kind == "pieces" and tokenizer.decoding.byte_fallback:
        out["tokenizer.ggml.model"] = "llama"
        out["tokenizer.ggml.pre"] = "default"
        out["tokenizer.ggml.scores"] = _scores_from_merges(texts, merges)
        out["tokenizer.ggml.add_space_prefix"] = _adds_space(state)
        for i, text in enumerate(spellings):
            if types[i] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                types[i] = BYTE
        unknown = model.get("unk_token")
        if unknown in model["vocab"]:
            types[model["vocab"][unknown]] = UNKNOWN
            out["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
    else:
        raise UnsupportedModelError("GGUF export knows byte-level BPE and SentencePiece BPE with byte fallback only")
    if tokenizer.bos_token_id is not None:
        out["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.eos_token_ids:
        out["tokenizer.ggml.eos_token_id"] = tokenizer.eos_token_ids[0]
    pad = tokenizer.special_tokens.get("pad_token")
    if pad and (pad_id := tokenizer.backend.token_to_id(pad)) is not None:
        out["tokenizer.ggml.padding_token_id"] = pad_id
    around = tokenizer.encode("")  # what the tokenizer puts around every text
    adds_bos = bool(around) and around[0] == tokenizer.bos_token_id
    rest = around[adds_bos:]
    out["tokenizer.ggml.add_bos_token"] = adds_bos
    out["tokenizer.ggml.add_eos_token"] = bool(rest) and rest[-1] in tokenizer.eos_token_ids
    if tokenizer.chat_template:
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out


def _pre_tokenizer_name(state: dict[str, Any]) -> str:
    """The GGUF name of a tokenizer.json's pre-tokenizer: the first in the table that cuts the same way."""
    outer = state["pre_tokenizer"] or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    splits: list[str] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                splits += [_GPT2] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                splits.append(r"\p{N}")
            case {"type": "Split", "pattern": {"Regex": str(pattern)}} if ANY_OF_LENGTH.fullmatch(pattern):
                pass  # bimo's own: only a run of more than a hundred letters may get other ids in two places
            case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
                # isolating matches, and removing what lies between them, cut alike when all text matches
                splits.append(pattern)
            case _:
                raise UnsupportedModelError(f"GGUF has no name for the pre-tokenizer {step.get('type')!r}")
    nfc = _finds(state["normalizer"], "type", "NFC")
    whole_words = bool(state["model"].get("ignore_merges"))
    wanted = PreTokenizer(tuple(splits), nfc, whole_words)
    names = [name for name, pre in PRE_TOKENIZERS.items() if pre == wanted]
    names += [name for name, pre in PRE_TOKENIZERS.items() if pre.splits == wanted.splits]
    if not names:
        raise UnsupportedModelError(f"GGUF has no name bimo knows for a pre-tokenizer that splits by {splits}")
    return names[0]


def _finds(node: Any, key: str, value: Any) -> bool:
    """Whether `key: value` is anywhere in a JSON value."""
    if isinstance(node, dict):
        return node.get(key) == value or any(_finds(entry, key, value) for entry in node.values())
    return isinstance(node, list) and any(_finds(entry, key, value) for entry in node)


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text."""
    return (
        _finds(state["normalizer"], "type", "Prepend")
        or _finds(state["pre_tokenizer"], "prepend_scheme", "always")
        or _finds(state["pre_tokenizer"], "prepend_scheme", "first")
    )


def _scores_from_merges(texts: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins the best score first, a merge list the lowest rank: score = -rank of the first merge."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(merges)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, 0)) for text in texts]
