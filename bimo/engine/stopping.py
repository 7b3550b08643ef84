"""When a sequence ends, and with which text: end tokens, stop strings, lengths, a constraint that is fulfilled.

`update_after_token` is the way of sampled sequences, token by token. Searches first ask `would_end` about a candidate,
and make the text of a chosen answer at once with `finish_text`.
"""

from __future__ import annotations

from bimo.engine.request import FinishReason
from bimo.engine.sequence import Sequence
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.stream import TextStream

__all__ = ["finish_text", "stop_reason_of", "update_after_token", "would_end"]


def update_after_token(sequence: Sequence, token: int) -> str:
    """Append a token; set finish_reason and stop_reason if it ends the sequence; return the text to show now."""
    sequence.append(token)
    text = sequence.text
    assert text is not None
    ended = token in sequence.eos_token_ids or token in sequence.sampling.stop_token_ids
    if sequence.constraint is not None and not ended:
        sequence.constraint.accept(token)
    piece = "" if ended else text.push(token)
    if ended:
        sequence.finish_reason = "stop"
        sequence.stop_reason = None if token in sequence.eos_token_ids else token
    elif text.stopped is not None:
        sequence.finish_reason, sequence.stop_reason = "stop", text.stopped
    elif sequence.constraint is not None and sequence.constraint.finished:
        sequence.finish_reason = "stop"
    elif sequence.num_output >= sequence.max_tokens:
        sequence.finish_reason = "length"
    return piece + text.flush() if sequence.finish_reason else piece


def would_end(sequence: Sequence, token: int, tokenizer: Tokenizer) -> FinishReason | None:
    """The reason `token` would end the sequence, or None."""
    if token in sequence.eos_token_ids or token in sequence.sampling.stop_token_ids:
        return "stop"
    if sequence.sampling.stop and sequence.num_output >= sequence.sampling.min_tokens:
        text = tokenizer.decode([*sequence.output_ids, token])
        if any(stop in text for stop in sequence.sampling.stop):
            return "stop"
    return "length" if sequence.num_output + 1 >= sequence.max_tokens else None


def stop_reason_of(sequence: Sequence) -> int | None:
    """The stop token that ended a sequence, if one did."""
    last = sequence.token_ids[-1]
    return last if last in sequence.sampling.stop_token_ids and last not in sequence.eos_token_ids else None


def finish_text(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """The whole text of a finished sequence, without end tokens and cut at a stop string."""
    ids = sequence.output_ids
    if ids and (ids[-1] in sequence.eos_token_ids or ids[-1] in sequence.sampling.stop_token_ids):
        ids = ids[:-1]
    sampling = sequence.sampling
    text = TextStream(tokenizer, sampling.stop, sampling.include_stop, sampling.min_tokens)
    return "".join([text.push(token) for token in ids]) + text.flush()
