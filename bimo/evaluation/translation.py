"""How well sentences are translated: BLEU and chrF over held-out pairs, beside two baselines.

    pairs = read_pairs(Path("held-out.jsonl"))
    with bimo.load("runs/en-zh/model") as model:
        table = evaluate_translation(ModelTranslator(model.backend, beams=4), pairs, training_pairs=...)
    print("\\n".join(table.lines()))

By sacrebleu, so that figures compare with those of others: each table carries its signatures (which tokenization, which
smoothing, which version). BLEU (Papineni et al. 2002) over words, of Chinese over characters (tokenize "zh"); chrF
(Popović 2015) over characters. "±" is half of the 95 % interval of 1000 bootstrap samples of the pairs (Koehn 2004).

Anything that maps sources to translations is measured alike:

    evaluate_translation(lambda sources: [my_translation(source) for source in sources], pairs, name="mine")
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bimo.backends.base import Backend
from bimo.engine.request import Output, Request, SamplingParams
from bimo.errors import ContextLengthError, EngineError, UsageError
from bimo.evaluation.pairs import Pair, languages_of
from bimo.evaluation.translation_baselines import TranslationMemory, WordLexicon
from bimo.tokenizer.chat import encode_chat

__all__ = [
    "ModelTranslator",
    "TranslationScore",
    "TranslationTable",
    "check_prompt",
    "evaluate_translation",
    "score_translations",
]

NUM_BOOTSTRAP, SEED = 1000, 12345  # sacrebleu's
MAX_IN_FLIGHT = 64  # sentences translated at one time
NAMES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian", "zh": "Chinese",
}  # fmt: skip

Translate = Callable[[Sequence[str]], Sequence[str]]
Progress = Callable[[int, int], None]  # sentences translated, sentences to translate


@dataclass(frozen=True, kw_only=True)
class TranslationScore:
    """Of one translator; 0 to 100, higher is better. The intervals are half of the 95 % intervals' width."""

    name: str
    bleu: float
    bleu_interval: float
    chrf: float
    chrf_interval: float


@dataclass(frozen=True, kw_only=True)
class TranslationTable:
    """The translators over the same pairs. Signatures are sacrebleu's. num_known: pairs whose source the training pairs
    have word for word, where a memory is enough."""

    scores: tuple[TranslationScore, ...]
    num_pairs: int
    num_known: int
    source_language: str
    target_language: str
    bleu_signature: str
    chrf_signature: str

    def lines(self) -> list[str]:
        """For people: a head, a line a translator, the signatures."""
        width = max(len("TRANSLATOR"), *(len(score.name) for score in self.scores))
        rows = [
            f"{score.name.ljust(width)}  {score.bleu:6.2f} ±{score.bleu_interval:5.2f}  "
            f"{score.chrf:6.2f} ±{score.chrf_interval:5.2f}"
            for score in self.scores
        ]
        head = f"{'TRANSLATOR'.ljust(width)}  {'BLEU'.rjust(13)}  {'CHRF'.rjust(13)}"
        return [head, *rows, f"BLEU: {self.bleu_signature}", f"chrF: {self.chrf_signature}"]


class ModelTranslator:
    """The model behind a backend as a translator: sentences are computed together, greedily or with `beams`.

    An encoder-decoder reads the source itself. A decoder is asked in words, through its chat template; without one it
    goes on with "English: ...", "Chinese:" up to the end of the line.

    Args:
        prompt: what is sent in the place of this, with {source} where the sentence belongs. "{source}" suits a decoder
            that was trained on dialogues of sentence and translation, "translate English to German: {source}" a T5.
        languages: codes of source and target, for the wording.
        max_tokens: of a translation; None: three times those of the source and 32, so that no loop goes on for ever.
        progress: called after every sentence, in the caller's thread.

    num_too_long counts the sources that did not fit into the context; their translation is "".
    """

    def __init__(
        self,
        backend: Backend,
        *,
        languages: tuple[str, str] = ("", ""),
        beams: int = 1,
        prompt: str | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_prompt("{source}" if prompt is None else prompt)
        self.backend, self.max_tokens, self.progress = backend, max_tokens, progress
        self.search: dict[str, Any] = {"num_beams": beams} if beams > 1 else {"temperature": 0}
        self.is_chat, self.stop = False, tuple[str, ...]()
        source, target = (NAMES.get(code, code) for code in languages)
        if backend.info().reads_source:
            self.prompt = prompt or "{source}"
        elif backend.tokenizer.chat_template:
            self.is_chat = True
            self.prompt = prompt or f"Translate into {target or 'the other language'}: {{source}}"
        else:
            self.stop = ("\n",)
            self.prompt = prompt or f"{source or 'Source'}: {{source}}\n{target or 'Translation'}:"
        self.num_too_long = 0

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Raises EngineError, UsageError (more beams than the engine takes)."""
        translations = [""] * len(sources)
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        under_way: dict[str, int] = {}
        waiting = iter(enumerate(sources))
        self.num_too_long = num_done = 0
        try:
            while num_done < len(sources):
                while len(under_way) < MAX_IN_FLIGHT and (work := next(waiting, None)) is not None:
                    request = self._request(work[1])
                    try:
                        self.backend.submit(request, outputs.put)
                    except ContextLengthError:
                        self.num_too_long += 1
                        num_done += 1
                    else:
                        under_way[request.request_id] = work[0]
                if under_way:
                    output = outputs.get()
                    if output.finish_reason in ("error", "abort"):
                        raise EngineError(output.error or "the engine was closed while it translated: load it again")
                    translations[under_way[output.request_id]] += output.text
                    if output.usage is not None:
                        del under_way[output.request_id]
                        num_done += 1
                if self.progress is not None:
                    self.progress(num_done, len(sources))
        finally:
            for request_id in under_way:
                self.backend.abort(request_id)
        return [text.strip() for text in translations]

    def _request(self, source: str) -> Request:
        tokenizer = self.backend.tokenizer
        text = self.prompt.replace("{source}", source)
        room = self.max_tokens or 3 * len(tokenizer.encode(source, add_special_tokens=False)) + 32
        if self.is_chat:
            ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
        else:
            ids = tokenizer.encode(text)
        return Request(prompt_token_ids=ids, sampling=SamplingParams(max_tokens=room, stop=self.stop, **self.search))


def check_prompt(prompt: str) -> None:
    """UsageError unless there is a place for the sentence."""
    if "{source}" not in prompt:
        raise UsageError(f"the prompt must hold {{source}}, where the sentence is put in, not {prompt!r}", "prompt")


def score_translations(
    name: str, translations: Sequence[str], references: Sequence[str], target_language: str
) -> tuple[TranslationScore, str, str]:
    """The score, and the signatures of BLEU and chrF. Raises UsageError for empty lists, or of different lengths."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if not references or len(translations) != len(references):
        raise UsageError(f"{len(references)} references need as many translations, not {len(translations)}")
    figures: list[float] = []
    signatures: list[str] = []
    # force: no warning in the log about text that looks tokenized
    for metric in (BLEU(tokenize="zh" if target_language == "zh" else "13a", force=True), CHRF()):
        figures.append(float(metric.corpus_score(list(translations), [list(references)]).score))
        figures.append(_interval(metric, translations, references))
        signatures.append(str(metric.get_signature()))
    bleu, bleu_interval, chrf, chrf_interval = figures
    score = TranslationScore(name=name, bleu=bleu, bleu_interval=bleu_interval, chrf=chrf, chrf_interval=chrf_interval)
    return score, signatures[0], signatures[1]


def _interval(metric: Any, translations: Sequence[str], references: Sequence[str]) -> float:
    """Half the width of the 95 % interval, from the samples that sacrebleu's own n_bootstrap draws.

    That one fails where some samples score 0, and keeps all samples of all sentences at once: 0.7 GB for 10,000 pairs.
    """
    counts = np.array(metric._extract_corpus_statistics(list(translations), [list(references)]), np.float64)
    generator = np.random.default_rng(SEED)
    scores = []
    for _ in range(NUM_BOOTSTRAP):
        times = np.bincount(generator.choice(len(counts), len(counts)), minlength=len(counts))
        scores.append(float(metric._compute_score_from_stats((times @ counts).tolist()).score))
    metric.n_bootstrap, metric.seed = NUM_BOOTSTRAP, str(SEED)  # for the signature
    scores.sort()
    outside = NUM_BOOTSTRAP // 40
    return (scores[-1 - outside] - scores[outside]) / 2


def evaluate_translation(
    translate: Translate,
    pairs: Sequence[Pair],
    *,
    name: str = "model",
    training_pairs: Sequence[Pair] = (),
    target_language: str | None = None,
    source_language: str | None = None,
) -> TranslationTable:
    """Translate the sources of `pairs` and compare with their targets.

    Args:
        training_pairs: what the baselines learn from; none: no baselines.
        target_language, source_language: codes; None: as found in the pairs.
    """
    if not pairs:
        raise UsageError("there are no pairs to translate: give at least one", "pairs")
    found = languages_of(pairs)
    source_language = found[0] if source_language is None else source_language
    target_language = found[1] if target_language is None else target_language
    translators: dict[str, Translate] = {name: translate}
    if training_pairs:
        translators["translation memory"] = TranslationMemory.learn(training_pairs)
        translators["word by word"] = WordLexicon.learn(training_pairs)
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    known = {pair.source for pair in training_pairs}
    scores = []
    for label, translator in translators.items():
        score, bleu_signature, chrf_signature = score_translations(
            label, translator(sources), references, target_language
        )
        scores.append(score)
    return TranslationTable(
        scores=tuple(scores),
        num_pairs=len(pairs),
        num_known=sum(source in known for source in sources),
        source_language=source_language,
        target_language=target_language,
        bleu_signature=bleu_signature,
        chrf_signature=chrf_signature,
    )
