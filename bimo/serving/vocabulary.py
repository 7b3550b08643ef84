"""Tokens as OpenAI's two APIs show them in log-probabilities, with exact bytes.

Half a character has no text: chat shows U+FFFD and gives `bytes`, completions (which have no bytes) write
`bytes:\\xe4\\xbd`, as OpenAI did, so that different tokens keep different names in `top_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bimo.engine.request import Output, TokenLogprob
from bimo.tokenizer.load import Tokenizer

__all__ = ["Vocabulary"]

LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


class Vocabulary:
    """Spellings of token ids, made once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat: dict[int, tuple[str, list[int]]] = {}
        self._plain: dict[int, str] = {}

    def chat_entry(self, token: TokenLogprob) -> dict[str, Any]:
        """One element of a chat choice's `logprobs.content`."""
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def ends(self, output: Output) -> bool:
        """Whether the output's last token is the one that ended the answer and so has no part in its text."""
        if output.finish_reason != "stop" or not output.token_ids or isinstance(output.stop_reason, str):
            return False
        return output.stop_reason is not None or output.token_ids[-1] in self._tokenizer.eos_token_ids

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        if token_id not in self._chat:
            data = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
            self._chat[token_id] = (data.decode("utf-8", "replace"), list(data))
        text, data_bytes = self._chat[token_id]
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": data_bytes}

    @staticmethod
    def finite(logprob: float) -> float:
        """`logprob`, or OpenAI's stand-in where it is minus infinity."""
        return max(logprob, LOWEST)

    def name(self, token_id: int) -> str:
        """A token's text, or its bytes where they are no text."""
        if token_id not in self._plain:
            data = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
            try:
                self._plain[token_id] = data.decode("utf-8")
            except UnicodeDecodeError:
                self._plain[token_id] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self._plain[token_id]

    def top(self, token: TokenLogprob) -> dict[str, float]:
        """One element of a completion's `top_logprobs`: the likeliest and, as OpenAI has it, the token itself."""
        entries = {self.name(token_id): max(logprob, LOWEST) for token_id, logprob in token.top}
        return {**entries, self.name(token.token_id): max(token.logprob, LOWEST)}

    def count_characters(self, ids: Iterable[int]) -> list[int]:
        """How many characters begin in each token, control tokens counting none: the steps of `text_offset`."""
        return [sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id)) for token_id in ids]
