"""Examples as tokens, each with its mask: what the model is to write is learned, what it reads is not.

    write_tokens(folder, encode_examples(documents, tokenizer, max_tokens=513, refuse=print), ...)

A dialogue goes through the chat template that serving uses (tokenizer.chat); of a text without turns all is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bimo.data.records import Document
from bimo.data.shards import EncodedExample
from bimo.errors import DataError, UsageError
from bimo.tokenizer.bulk import bulk_encoder
from bimo.tokenizer.load import Tokenizer

__all__ = ["Refuse", "encode_examples"]

Refuse = Callable[[str, str], None]  # a document's id, and what is wrong with it


def encode_examples(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int, refuse: Refuse
) -> Iterator[EncodedExample]:
    """(id, ids, mask) of each document; `refuse` is told of those with more than `max_tokens` tokens, or which the
    template does not take. Raises DataError when the template writes no end after an answer."""
    from bimo.tokenizer.chat import encode_chat_with_mask

    encode = bulk_encoder(tokenizer)
    begin, end = [token for token in [tokenizer.bos_token_id] if token is not None], tokenizer.eos_token_ids[:1]
    for document in documents:
        try:
            if document.messages:
                ids, mask = encode_chat_with_mask(tokenizer, [message._asdict() for message in document.messages])
            else:
                ids = [*begin, *encode([document.text])[0].tolist(), *end]
                mask = [0] * len(begin) + [1] * (len(ids) - len(begin))
        except UsageError as error:
            refuse(document.id, str(error))
            continue
        if len(ids) > max_tokens:
            refuse(document.id, _too_long(ids, mask, max_tokens))
            continue
        if document.messages:
            _check_end(document.id, ids, mask, tokenizer)
        yield document.id, ids, mask


def _too_long(ids: list[int], mask: list[int], max_tokens: int) -> str:
    """Whether cutting would cost the answer or the question matters to who mends it."""
    answer = sum(mask)
    part = f"its answer alone has {answer}" if answer > max_tokens else f"{answer} of them are the answer"
    return f"has {len(ids)} tokens, a row holds {max_tokens - 1} ({part})"


def _check_end(name: str, ids: list[int], mask: list[int], tokenizer: Tokenizer) -> None:
    last = max(place for place, learned in enumerate(mask) if learned)
    if ids[last] in tokenizer.eos_token_ids:
        return
    ends = ", ".join(repr(tokenizer.special_text(token)) for token in tokenizer.eos_token_ids) or "none"
    raise DataError(
        f"{name}: the chat template writes no end-of-turn token after the answer ({ends} would end it), so a model "
        f"trained with it would never stop: add it after the assistant's content in chat_template.jinja"
    )
