"""The sections of a recipe: text, its cleaning, tokenizer, model, objective, training, report.

Each is a frozen pydantic model that refuses unknown keys; what a key means stands in the docstring of its section.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "OBJECTIVES",
    "CleanRecipe",
    "Count",
    "DataRecipe",
    "ModelRecipe",
    "ObjectiveRecipe",
    "ParallelRecipe",
    "ReportRecipe",
    "Section",
    "Share",
    "SourceRecipe",
    "TokenizerRecipe",
    "TrainingRecipe",
]

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

OBJECTIVES = {  # of each kind of model; the first is its usual one
    "decoder": ("causal",),
    "lstm": ("causal",),
    "encoder": ("masked",),
    "seq2seq": ("seq2seq", "denoise"),
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ParallelRecipe(Section):
    """The same documents in another language, whose elements have the same ids.

    path: a folder or a package, as of a source. sha256: of the package.
    replace: what in a document's path becomes what in its twin's: ["en-US", "zh-CN"]; if not given, they are equal.
    """

    path: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    replace: tuple[str, str] | None = None

    @field_validator("replace")
    @classmethod
    def _some(cls, replace: tuple[str, str] | None) -> tuple[str, str] | None:
        if replace is not None and not replace[0]:
            raise ValueError('replace names a part of the documents\' paths and what stands there in their twins\': '
                             '["en-US", "zh-CN"]')  # fmt: skip
        return replace


class SourceRecipe(Section):
    """Where documents come from.

    path: a file, a folder or a pattern (`**` too), relative to the recipe; or a package of a registry,
        "pypi:name==1.0", "npm:name@1.0", "deb:name=1.0", fetched once into the cache, nothing of it is run.
    files: patterns of the files to read inside a folder or package; files inside .zip archives count as inside.
    sha256: of the fetched package, which is then refused if it differs.
    format: how to read the files; "auto" goes by their names.
    encoding: of text files; "auto" finds it out.
    text: which field of a row (csv, tsv, jsonl, json, parquet) is the text, or a template such as "{word}: {meaning}".
    prompt, answer: the same for dialogues; both or none. Documents then hold messages.
    columns: names for the columns of a csv or tsv without a first line of names.
    line: of "txt", a regular expression with named groups: each line in which it is found is a row with these fields.
    parallel: where the same HTML pages stand in another language. Each element with an id, such as a paragraph, becomes
        a dialogue: the user has its text, the assistant that of the twin's element; `language` is the assistant's.
    language: of all its documents, when known; else it is found out.
    weight: how often it is read in training, in relation to its size.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    path: str = Field(min_length=1)
    files: tuple[str, ...] = ("**/*",)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    format: Literal[
        "auto", "txt", "md", "jsonl", "json", "csv", "tsv", "yaml", "parquet", "html", "pdf", "docx", "eml"
    ] = "auto"
    encoding: str = "auto"
    text: str = "text"
    prompt: str | None = None
    answer: str | None = None
    columns: tuple[str, ...] | None = None
    line: str | None = None
    parallel: ParallelRecipe | None = None
    language: str | None = None
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> SourceRecipe:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("a dialogue needs both prompt and answer")
        if self.line is not None:
            self._check_line(self.line)
        if self.parallel is not None:
            if self.format not in ("auto", "html"):
                raise ValueError(f'parallel documents are HTML pages, with format = "{self.format}" it has no effect')
            if self.prompt is not None or self.line is not None or self.text != "text":
                raise ValueError("text, prompt, answer and line have no effect beside parallel: remove them")
        return self

    def _check_line(self, pattern: str) -> None:
        if self.format != "txt":
            raise ValueError('line is for lines of plain text: write format = "txt" beside it, or remove it')
        try:
            fields = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"line is not a regular expression ({error})") from None
        if not fields:
            raise ValueError(r"line names no field: write a group such as (?P<text>.*) into it")


class CleanRecipe(Section):
    """The steps of cleaning; each can be switched off. Rewrites run first, then what drops whole documents.

    mojibake: text that was decoded with the wrong encoding (ftfy).
    unicode: NFC, one kind of line ending, no control and zero-width characters (joiners that emoji need stay).
    markup: left-over tags and entities, lines that are navigation or copyright notices.
    full_width: full-width letters, digits and spaces become ASCII; Chinese punctuation stays.
    simplified: traditional Chinese becomes simplified (OpenCC); not in sources whose language is Japanese or Korean.
    languages: only these are kept; empty keeps all.
    quality: too short, repetitive, mostly symbols; rules that know both Chinese and English.
    min_chars: shortest document; dialogues may be shorter.
    personal_data: "mask" writes [EMAIL], [PHONE], [ID], [CARD], [IP] in their place; "drop" drops the document.
    toxic: documents with more than this share of words from `toxic_words` are dropped; 1 keeps all.
    toxic_words: files with one word a line.
    exact_duplicates: the same text again (case and space aside).
    near_duplicates: Jaccard similarity of 5-character shingles from which a document counts as a copy; 1 keeps all.
    """

    mojibake: bool = True
    unicode: bool = True
    markup: bool = True
    full_width: bool = True
    simplified: bool = True
    languages: tuple[str, ...] = ()
    quality: bool = True
    min_chars: int = Field(default=20, ge=0)
    personal_data: Literal["keep", "mask", "drop"] = "mask"
    toxic: Share = 1.0
    toxic_words: tuple[str, ...] = ()
    exact_duplicates: bool = True
    near_duplicates: float = Field(default=0.8, gt=0, le=1)


class DataRecipe(Section):
    """Sources, cleaning, and how the result is divided.

    validation: share of the documents that is kept out of training, chosen by a hash of their text; of a dialogue, of
        what comes before the answer; of a page's pairs, of the page's name, so that none is in both parts.
    passage_chars: longer documents are cut into passages of at most this many characters, at sentence ends; 0: never.
    leaks: what to do with validation documents that stand in the training data as well: "stop", "drop" them from
        validation, or "warn".
    """

    sources: tuple[SourceRecipe, ...] = ()
    clean: CleanRecipe = CleanRecipe()
    validation: Share = 0.01
    passage_chars: int = Field(default=0, ge=0)
    leaks: Literal["stop", "drop", "warn"] = "stop"

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[SourceRecipe, ...]) -> tuple[SourceRecipe, ...]:
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {twice[0]}")
        return sources


class TokenizerRecipe(Section):
    """Learned from the training documents.

    kind: byte-level "bpe" (GPT-2's way; every text has a spelling), "wordpiece" (BERT's, and an encoder's if nothing is
        said) or "unigram" (T5's, on bytes).
    sample_bytes: of text to learn from, taken evenly. Learning takes 75 times as much memory, and more text changes
        little: LOG.md has both.
    """

    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    vocab_size: int = Field(default=16_384, ge=300, le=1_000_000)
    sample_bytes: Count = 20_000_000


class ModelRecipe(Section):
    """hidden_size and num_layers make the size, the rest follows from them if not given.

    kind: "decoder" of Llama's shape, which writes text; "lstm", the recurrent baseline; "encoder" of BERT's shape,
        which reads; "seq2seq", which reads one text and writes another.
    family: of a seq2seq model: "marian", the original Transformer, "bart" or "t5".
    num_decoder_layers: of a seq2seq model, whose encoder has num_layers; the same if not given.
    """

    kind: Literal["decoder", "lstm", "encoder", "seq2seq"] = "decoder"
    family: Literal["marian", "bart", "t5"] = "marian"
    hidden_size: Count = 384
    num_decoder_layers: Count | None = None
    num_layers: Count = 6
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    intermediate_size: Count | None = None
    context_length: Annotated[int, Field(ge=8)] = 512
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _divisible(self) -> ModelRecipe:
        heads = self.heads
        if self.kind == "lstm":
            return self
        if self.kind != "decoder" and self.num_kv_heads:
            raise ValueError("num_kv_heads is a decoder's: leave it out")
        if self.hidden_size % heads or self.hidden_size // heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {heads}")
        if heads % (self.num_kv_heads or heads):
            raise ValueError(f"num_heads {heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def heads(self) -> int:
        """num_heads; 64 wide each, if it was not given."""
        return self.num_heads or max(1, self.hidden_size // 64)


class ObjectiveRecipe(Section):
    """What is learned from the text.

    kind: "causal", the next token; "masked", hidden words (arXiv:1810.04805); "seq2seq", an answer from a question, for
        sources of pairs; "denoise", what was taken out of a text (spans for t5, arXiv:1910.10683; infilling for
        others, arXiv:1910.13461). "auto": causal for decoder and lstm, masked for encoder, seq2seq for seq2seq.
    share: of the tokens that are hidden (masked, denoise).
    whole_words: all pieces of a word, all characters of a Chinese one, are hidden together (masked).
    next_sentence: the encoder also judges whether a text follows another one (masked).
    mean_span: tokens taken out in one place, on average (denoise).
    r_drop: weight of the divergence between two passes with different dropout (arXiv:2106.14448); 0: one pass.
    """

    kind: Literal["auto", "causal", "masked", "seq2seq", "denoise"] = "auto"
    share: float = Field(default=0.15, gt=0, lt=1)
    whole_words: bool = True
    next_sentence: bool = True
    mean_span: float = Field(default=3.0, ge=1)
    r_drop: float = Field(default=0.0, ge=0)


class TrainingRecipe(Section):
    """How a model is trained.

    steps: optimiser steps. batch_tokens: tokens of one. micro_batch: sequences computed at once.
    optimizer: "adamw" (arXiv:1711.05101), "sgd" or "muon" (matrices by orthogonalised momentum, the rest by adamw).
    schedule: after `warmup` (a share of the steps) "cosine" or "linear" decay to `final_learning_rate` times the peak,
        "constant", or "wsd" (arXiv:2404.06395): constant, then linear over the last fifth.
    clip: the gradient's largest norm; 0: none.
    dtype: "bfloat16" computes products in it (autocast), weights and optimiser stay float32; "auto" where it is fast.
    ema: decay of an average of the weights that is saved in their place; 0: none.
    early_stopping: evaluations without a better validation loss after which training ends, with the best; 0: never.
    curriculum: shares of the steps at growing lengths, e.g. [[0.3, 128], [0.7, 512]]; empty: always full length.
    checkpoint_minutes: time between checkpoints. keep_checkpoints: how many stay.
    parallel: how several processes (torchrun) share the work: "ddp", each has the whole model, "fsdp", each has a part
        of every weight and of the optimiser; "auto": ddp. Without effect in one process.
    """

    steps: Count = 1000
    batch_tokens: Count = 16_384
    micro_batch: Count = 8
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: Share = 0.02
    final_learning_rate: Share = 0.1
    clip: float = Field(default=1.0, ge=0)
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    eval_every: Count = 250
    eval_tokens: Count = 65_536
    early_stopping: int = Field(default=0, ge=0)
    curriculum: tuple[tuple[Share, Count], ...] = ()
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    keep_checkpoints: Count = 2
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...] = ("tensorboard",)

    @field_validator("curriculum")
    @classmethod
    def _whole(cls, stages: tuple[tuple[float, int], ...]) -> tuple[tuple[float, int], ...]:
        if stages and abs(sum(share for share, _ in stages) - 1) > 1e-6:
            raise ValueError("the shares of a curriculum must sum to 1")
        return stages


class ReportRecipe(Section):
    """What the report shows of the finished model.

    prompts: texts it goes on with; sources of a seq2seq model; texts with [MASK] for an encoder.
    questions: what it is asked as a chat.
    ngram: order of an n-gram model that is counted on the same text and scored beside it (causal); 0: none.
    pairs: held-out pairs that are written by a seq2seq model and scored by BLEU and chrF; 0: none.
    beams: of the search that writes them.
    noise: share of the words in which mistakes are made (typos, homophones, dropped words) before classes are told
        once more; 0: none.
    """

    prompts: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    max_tokens: Count = 60
    ngram: int = Field(default=0, ge=0, le=5)
    pairs: int = Field(default=200, ge=0)
    beams: Count = 4
    noise: Share = 0.0
