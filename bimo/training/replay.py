"""Text like what a base was trained on, written by itself before it is trained (pseudo-rehearsal).

    documents = list(rehearse(model, samples=128, max_tokens=96, seed=0, progress=report))

What a model learned from is seldom at hand; what it says is. Learned again beside new tasks, its own texts hold it near
to what it was (Robins 1995; of language models arXiv:2403.01244). A chat model is asked nothing: behind the beginning
of a user's turn it writes the question itself, and then answers it (arXiv:2406.08464). A base model goes on from the
beginning of a text.

Kept out of training, such texts measure forgetting: their loss, less that of the base, is how far the tuned model has
moved from it (an estimate of the divergence KL(base ‖ tuned) a token).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bimo.data.records import Document, Message
from bimo.errors import ContextLengthError
from bimo.registries.trouble import Progress
from bimo.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from bimo.backends.facade import Model

__all__ = ["NAME", "rehearse"]

NAME = "replay"
MARK = "8c1f27d6"  # stands for a question while the template is rendered
AT_ONCE = 32
MOST_QUESTION = 64  # tokens


def rehearse(model: Model, *, samples: int, max_tokens: int, seed: int, progress: Progress) -> Iterator[Document]:
    """`samples` texts, less those that came out empty or twice; the same for the same seed and machine."""
    tokenizer, done, seen = model.tokenizer, 0, set[str]()
    start = _start_of_question(tokenizer)
    while done < samples:
        count = min(AT_ONCE, samples - done)
        progress("the base writes texts to remember", done, samples)
        settings = {"temperature": 1.0, "top_p": 1.0, "seed": seed * samples + done}
        if start is None:
            texts = _all(model.generate(_beginning(tokenizer), n=count, max_tokens=max_tokens, **settings))
            dialogues: Sequence[tuple[Message, ...]] = [()] * count
        else:
            asked = _all(model.generate(start, n=count, max_tokens=MOST_QUESTION, stop=("\n",), **settings))
            dialogues = list(_answered(model, [text.strip() for text in asked if text.strip()], max_tokens))
            texts = ["\n".join(message.content for message in dialogue) for dialogue in dialogues]
        for number, (text, messages) in enumerate(zip(texts, dialogues, strict=True)):
            if text.strip() and text not in seen and "\ufffd" not in text:
                seen.add(text)
                yield Document(text, f"{NAME}/{done + number}", NAME, messages=messages)
        done += count
    progress("the base writes texts to remember", samples, samples)


def _answered(model: Model, questions: Sequence[str], max_tokens: int) -> Iterator[tuple[Message, ...]]:
    """All questions in one batch; an answer that was cut off or is empty teaches nothing, and a question that fills a
    short context gets none."""
    import asyncio

    async def ask(question: str) -> Any:
        with contextlib.suppress(ContextLengthError):
            return await model.achat([{"role": "user", "content": question}], max_tokens=max_tokens, temperature=0)

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*map(ask, questions))

    for question, answer in zip(questions, asyncio.run(ask_all()), strict=True):
        if answer is not None and answer.text.strip() and answer.finish_reason == "stop":
            yield Message("user", question), Message("assistant", answer.text.strip())


def _all(completions: Any) -> list[str]:
    return [completion.text for completion in (completions if isinstance(completions, list) else [completions])]


def _start_of_question(tokenizer: Tokenizer) -> list[int] | None:
    """Ids of all that stands before a user's first words; None without a chat template."""
    if not tokenizer.chat_template:
        return None
    from bimo.tokenizer.chat import render_chat

    rendered = render_chat(tokenizer, [{"role": "user", "content": MARK}], add_generation_prompt=False)
    return tokenizer.encode(rendered[: rendered.index(MARK)], add_special_tokens=False)


def _beginning(tokenizer: Tokenizer) -> list[int]:
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(tokenizer.eos_token_ids), 0)
    return [begin]
