"""llama.cpp through llama-cpp-python's low-level calls, since its high-level class computes one sequence at a time.

One context for single requests, which keeps the last conversation's keys and values as llama.cpp's own programs do, and
one for batches, with a stream of its own for every sequence. With `lookup`, the high-level class with its prompt-lookup
drafts, which exist only there.
"""

from __future__ import annotations

import ctypes

from benchmarks.workers.protocol import Generate, run

CONTEXT = 8192
CONTEXT_IN_BATCH = 1024  # a sequence
CHUNK = 2048  # tokens a llama_decode call


class Sequences:
    """A llama.cpp context for `count` sequences decoded together, greedily."""

    def __init__(self, model: object, count: int, length: int, threads: int) -> None:
        import llama_cpp as api

        self.api, self.count = api, count
        settings = api.llama_context_default_params()
        settings.n_ctx = count * length
        settings.n_seq_max = count
        settings.n_batch = CHUNK
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(CHUNK, 0, 1)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.kept: list[int] = []  # what a single sequence's cache holds

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for answer, token in zip(answers, self._prefill(prompts), strict=True):
            answer.append(token)
        for step in range(new_tokens - 1):
            entries = [
                (answer[-1], len(prompt) + step, number, True)
                for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
            for answer, token in zip(answers, self._decode(entries), strict=True):
                answer.append(token)
        self.kept = prompts[0] + answers[0][:-1]
        return answers

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token of each; of a single prompt the part that is cached is not computed again."""
        shared = 0
        if self.count == 1:
            limit = min(len(self.kept), len(prompts[0]) - 1)
            shared = next((i for i in range(limit) if self.kept[i] != prompts[0][i]), limit)
            self.api.llama_memory_seq_rm(self.memory, 0, shared, -1)
        else:
            self.api.llama_memory_clear(self.memory, False)
        entries = [
            (prompt[position], position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position in range(shared, len(prompt))
        ]
        chunks = (entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK))
        return [token for chunk in chunks for token in self._decode(chunk)]

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) entries; the most likely next token of those wanted."""
        import numpy

        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        tokens = []
        for i, entry in enumerate(entries):
            if entry[3]:
                address = ctypes.cast(self.api.llama_get_logits_ith(self.context, i), ctypes.POINTER(ctypes.c_float))
                tokens.append(int(numpy.ctypeslib.as_array(address, (self.vocab_size,)).argmax()))
        return tokens


def load(model: str, threads: int, lookup: int = 0) -> Generate:
    """`lookup`: tokens drafted from the prompt at a time; 0: none."""
    import llama_cpp

    if lookup:
        return load_lookup(model, threads, lookup)
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot read {model}")
    contexts: dict[int, Sequences] = {}

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        count = len(prompts)
        if count not in contexts:
            contexts[count] = Sequences(loaded, count, CONTEXT if count == 1 else CONTEXT_IN_BATCH, threads)
        return contexts[count].generate(prompts, new_tokens)

    return generate


def load_lookup(model: str, threads: int, lookup: int) -> Generate:
    """The high-level class with prompt-lookup drafts. It keeps the logits of the whole context: hence a short one."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llama = Llama(
        model,
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup),
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            stream = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
            answers.append([token for _, token in zip(range(new_tokens), stream, strict=False)])
        return answers

    return generate


if __name__ == "__main__":
    run(load)
