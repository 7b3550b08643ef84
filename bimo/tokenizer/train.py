"""Learn a tokenizer from text, with Hugging Face `tokenizers`, and measure how well one compresses.

    backend = train_tokenizer(texts, kind="bpe", vocab_size=16384)       # extra=SEQ2SEQ_TOKENS for an encoder-decoder
    save_tokenizer(backend, directory)
    compression(Tokenizer.from_directory(directory), texts)     # Compression(bytes, characters, tokens)

"bpe" and "unigram" work on bytes (GPT-2's alphabet): every text has a spelling and comes back as it was. "wordpiece"
is BERT's: spaces are not kept, and unknown characters are [UNK]. Papers: BPE arXiv:1508.07909, Unigram
arXiv:1804.10959, WordPiece arXiv:1609.08144.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimo.errors import BimoError, UsageError
from bimo.tokenizer.load import Tokenizer

__all__ = ["CHAT_TEMPLATE", "SEQ2SEQ_TOKENS", "Compression", "compression", "save_tokenizer", "train_tokenizer"]

# Before merging, text is cut into words with the space before them, single digits, and runs of punctuation (Qwen2's
# rule): a digit a token keeps arithmetic regular, and merges do not run across words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_WORD = 100  # characters; Chinese has no spaces, and BPE's training is quadratic in the length of a "word"
END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
PAD, MASK = "<pad>", "<mask>"
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]  # T5's
SEQ2SEQ_TOKENS = (PAD, MASK, *SENTINELS)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What a text became. More bytes a token is better; characters a token shows it per language."""

    num_bytes: int
    num_characters: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.num_tokens)

    @property
    def characters_per_token(self) -> float:
        return self.num_characters / max(1, self.num_tokens)


def train_tokenizer(
    texts: Iterable[str], *, kind: str = "bpe", vocab_size: int = 16_384, extra: Sequence[str] = ()
) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab_size` words (fewer where the text has no more to offer).

    kind: "bpe", "unigram" or "wordpiece". extra: control tokens beside the kind's own; with SEQ2SEQ_TOKENS a text ends
    with <|endoftext|> instead of beginning with it. Raises UsageError for no text at all.
    """
    import tokenizers

    backend, trainer = _MAKERS[kind](tokenizers, vocab_size, extra)
    seen = False

    def watched() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    try:
        backend.train_from_iterator(watched(), trainer)
    except Exception as error:  # the Rust library raises bare Exception, also for what `texts` raised
        if isinstance(error.__cause__ or error, BimoError):
            raise
        if not seen:
            raise UsageError(
                "a tokenizer is learned from text, and there is none: check the recipe's sources"
            ) from None
        raise BimoError(f"the tokenizer could not be learned ({error}): try more text or another vocab_size") from error
    if not seen:
        raise UsageError("a tokenizer is learned from text, and there is none: check the recipe's sources")
    _FINISHERS[kind](tokenizers, backend)
    return backend


def save_tokenizer(backend: Any, directory: Path, *, model_max_length: int | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`; for a decoder's also the chat template and
    generation_config.json, which says where an answer ends."""
    directory.mkdir(parents=True, exist_ok=True)
    is_bert, pad = backend.token_to_id(BERT_TOKENS["cls"]) is not None, backend.token_to_id(PAD)

    def write(name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if is_bert:
        config |= {f"{name}_token": text for name, text in BERT_TOKENS.items()}
    elif pad is not None:
        config |= {"eos_token": END, "pad_token": PAD, "mask_token": MASK, "extra_special_tokens": SENTINELS}
        end = backend.token_to_id(END)
        write("generation_config.json", {"decoder_start_token_id": pad, "eos_token_id": end, "pad_token_id": pad})
    else:
        config |= {"bos_token": END, "eos_token": END, "pad_token": END}
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        end, end_of_turn = backend.token_to_id(END), backend.token_to_id(END_OF_TURN)
        write("generation_config.json", {"bos_token_id": end, "eos_token_id": [end_of_turn, end], "pad_token_id": end})
    if model_max_length:
        config["model_max_length"] = model_max_length
    backend.save(str(directory / "tokenizer.json"))
    write("tokenizer_config.json", config)


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> Compression:
    """How many tokens `texts` take, all together."""
    num_bytes = num_characters = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode("utf-8", "replace"))
        num_characters += len(text)
        num_tokens += len(tokenizer.encode(text, add_special_tokens=False))
    return Compression(num_bytes=num_bytes, num_characters=num_characters, num_tokens=num_tokens)


# --- the three kinds --------------------------------------------------------------------------------------------------


def _byte_pieces(lib: Any) -> Any:
    """Words, cut where they get too long, as bytes."""
    split = lib.pre_tokenizers.Split
    return lib.pre_tokenizers.Sequence([
        split(lib.Regex(WORDS), behavior="isolated"),
        split(lib.Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), behavior="isolated"),
        lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def _bpe(lib: Any, vocab_size: int, extra: Sequence[str]) -> tuple[Any, Any]:
    backend = lib.Tokenizer(lib.models.BPE())
    backend.pre_tokenizer = _byte_pieces(lib)
    return backend, lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START_OF_TURN, END_OF_TURN, *extra],
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _unigram(lib: Any, vocab_size: int, extra: Sequence[str]) -> tuple[Any, Any]:
    backend = lib.Tokenizer(lib.models.Unigram())
    backend.pre_tokenizer = _byte_pieces(lib)
    return backend, lib.trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START_OF_TURN, END_OF_TURN, *extra],
        unk_token=END,  # never used: every byte is in the alphabet
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _wordpiece(lib: Any, vocab_size: int, extra: Sequence[str]) -> tuple[Any, Any]:
    backend = lib.Tokenizer(lib.models.WordPiece(unk_token=BERT_TOKENS["unk"]))
    backend.normalizer = lib.normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
    return backend, lib.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*BERT_TOKENS.values(), *extra], show_progress=False
    )


def _finish_bytes(lib: Any, backend: Any) -> None:
    end = backend.token_to_id(END)
    is_seq2seq = backend.token_to_id(PAD) is not None
    single = f"$A {END}" if is_seq2seq else f"{END} $A"
    backend.post_processor = lib.processors.TemplateProcessing(single=single, special_tokens=[(END, end)])
    backend.decoder = lib.decoders.ByteLevel()


def _finish_wordpiece(lib: Any, backend: Any) -> None:
    cls, sep = BERT_TOKENS["cls"], BERT_TOKENS["sep"]
    backend.post_processor = lib.processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, backend.token_to_id(cls)), (sep, backend.token_to_id(sep))],
    )
    backend.decoder = lib.decoders.WordPiece()


_MAKERS = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece}
_FINISHERS = {"bpe": _finish_bytes, "unigram": _finish_bytes, "wordpiece": _finish_wordpiece}
