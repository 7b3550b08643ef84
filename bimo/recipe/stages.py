"""The [[stage]]s of a recipe: what becomes of a model that exists, by examples.

[[stage]]
kind = "finetune"
name = "chat"
base = "smollm2"

[stage.adapter]
kind = "lora"
rank = 16

[[stage.task]]
name = "support"
path = "questions.csv"
prompt = "question"
answer = "reply"
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bimo.recipe.sections import CleanRecipe, Count, Section, Share, SourceRecipe, TrainingRecipe

__all__ = [
    "TARGETS",
    "AdapterRecipe",
    "AugmentRecipe",
    "EmbeddingRecipe",
    "PenaltyRecipe",
    "PseudoLabelRecipe",
    "ReplayRecipe",
    "RobustRecipe",
    "StageRecipe",
    "StageTrainingRecipe",
    "Target",
    "TaskRecipe",
]

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
RESERVED = {"replay", "general", "pseudo"}  # files of a stage beside its tasks
SHORTEST_PASSAGE = 50  # characters
MOST = 65_536  # ranks and widths; more are more than any matrix has
TARGETS: tuple[Target, ...] = ("q", "k", "v", "o", "gate", "up", "down")


class AdapterRecipe(Section):
    """A few new weights beside a base whose own stay as they are.

    kind: "lora" (arXiv:2106.09685); "adalora", whose ranks are shared out while it trains (arXiv:2303.10512);
        "bottleneck", small layers behind attention and MLP (arXiv:1902.00751); "prefix", keys and values before every
        text (arXiv:2101.00190).
    rank: of a matrix's change; of adalora, on average at the end. initial_rank: of adalora at the start; 0: half more.
    alpha: the change counts alpha / rank, with `rslora` alpha / sqrt(rank) (arXiv:2312.03732).
    dropout: of what the change reads. targets: the matrices that are changed; a plain MLP has up and down.
    dora: direction and size of the weights are learned apart (arXiv:2402.09353).
    quant: the base's matrices are kept in 8 or 4 bits while it trains (QLoRA, arXiv:2305.14314).
    width: of a bottleneck. tokens: of a prefix.
    """

    kind: Literal["lora", "adalora", "bottleneck", "prefix"] = "lora"
    rank: int = Field(default=16, gt=0, le=MOST)
    initial_rank: int = Field(default=0, ge=0, le=MOST)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = TARGETS
    rslora: bool = False
    dora: bool = False
    quant: Literal["none", "int8", "int4"] = "none"
    width: int = Field(default=64, gt=0, le=MOST)
    tokens: Count = 20

    @model_validator(mode="after")
    def _fitting(self) -> AdapterRecipe:
        if (self.rslora or self.dora) and self.kind != "lora":
            raise ValueError(f"rslora and dora are ways of lora, with kind {self.kind} they have no effect")
        if self.initial_rank and (self.kind != "adalora" or self.initial_rank < self.rank):
            raise ValueError("initial_rank is what adalora begins with, at least rank: leave it out")
        return self


class AugmentRecipe(Section):
    """Altered copies of the training examples, of their questions only; each is known by its id. Never of validation.

    copies: of an example, at most; each is altered in one of the ways below. They are shares of the words:
    synonyms: by WordNet's (English) and by those in `synonym_files`. synonym_files: a word and its synonyms a line,
        between spaces, tabs or commas; or 同义词词林.
    insert: another word's synonym is put in. swap: two words change places. delete: left out.
    homophones: a Chinese character becomes one that sounds alike. shapes: one that looks alike.
    typos: two letters of an English word change places, one is lost, doubled or hit beside its key.
    back_translation: models that translate there and back, such as ["runs/zh-en/model", "runs/en-zh/model"]; one more
        copy. similarity: it has so much in common with its question at least, by pairs of neighbouring characters
        (Dice), else the translators lost the meaning; 0: every copy is believed.
    """

    copies: Count = 1
    synonyms: Share = 0.0
    synonym_files: tuple[str, ...] = ()
    insert: Share = 0.0
    swap: Share = 0.0
    delete: Share = 0.0
    homophones: Share = 0.0
    shapes: Share = 0.0
    typos: Share = 0.0
    back_translation: tuple[str, str] | None = None
    similarity: Share = 0.5

    @model_validator(mode="after")
    def _altering(self) -> AugmentRecipe:
        given = self.model_fields_set  # a share of 0 that was written may be one of several that are tried
        if not given - {"copies", "synonym_files", "similarity"}:
            raise ValueError("augment names no way to alter a text: give a share, such as synonyms = 0.1")
        if self.synonym_files and not given & {"synonyms", "insert"}:
            raise ValueError("synonym_files have no effect without synonyms or insert: give a share of the words")
        return self


class TaskRecipe(SourceRecipe):
    """A source of examples. weight: how often it is read, as of any source; 0: it is only scored. loss_weight: w of its
    part in the joint loss Σ w L / Σ w, where each L is an average over the task's own tokens.

    kind: "chat", dialogues of which the answers are learned; "text", all of it is; "labels", a text and its class;
        "pairs", two texts that belong together (a translation, a title and its passage). "auto" finds it out:
        messages, conversations (ShareGPT), instruction/input/output (Alpaca), prompt/completion, question/answer,
        text/label, or text.
    label: the field that holds the class; text: the one that is read. label_path: of whole files, a regular expression
        whose first group is found in their path, and is the class: "(ham|spam)-[12]/".
    instruction: of what a question is made, with {prompt} in it: "Translate into Chinese: {prompt}".
    system: what stands before every dialogue.
    """

    kind: Literal["auto", "chat", "text", "labels", "pairs"] = "auto"
    label: str | None = None
    label_path: str | None = None
    instruction: str | None = None
    system: str | None = None
    weight: float = Field(default=1.0, ge=0)
    loss_weight: float = Field(default=1.0, gt=0)
    augment: AugmentRecipe | None = None

    @field_validator("label_path")
    @classmethod
    def _with_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and not re.compile(pattern).groups:
                raise ValueError(f"label_path needs a group that is the class, as in (ham|spam), not {pattern!r}")
        except re.error as error:
            raise ValueError(f"label_path is not a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _one_reading(self) -> TaskRecipe:
        if self.label is not None and (self.prompt is not None or self.kind not in ("auto", "labels")):
            raise ValueError("label is for texts with a class: it has no effect beside prompt and answer")
        if self.instruction is not None and "{prompt}" not in self.instruction:
            raise ValueError(
                f"instruction says where the question goes by {{prompt}}, and this has none: {self.instruction!r:.60}"
            )
        return self


class ReplayRecipe(Section):
    """Against forgetting: text like what the base learned from is learned beside the tasks.

    share: of the rows; 0: none. source: such text. Without it the base writes `samples` texts itself before it is
    trained (pseudo-rehearsal, arXiv:2403.01244). A tenth of either is kept out, and scored before and after.
    max_tokens: of a text it writes.
    """

    share: Share = 0.1
    source: SourceRecipe | None = None
    samples: Count = 256
    max_tokens: Count = 128


class RobustRecipe(Section):
    """Training on what is made a little worse.

    kind: the embedding of the text is moved where the loss grows, and text and moved text are learned alike: "fgm",
        moved once (arXiv:1605.07725); "pgd", in `steps` steps (arXiv:1706.06083); "freelb", the text and the
        `steps` - 1 texts on its way, all of them are learned (arXiv:1909.11764). A step of training takes 2,
        `steps` + 1 and `steps` times as long.
    epsilon: how far, as a share of the embedding's size. step_size: of a step, as a share of epsilon; fgm goes all the
        way at once.
    neftune: alpha of random noise on the embedding (arXiv:2310.05914), often 5; 0: none. Costs nothing.
    """

    kind: Literal["none", "fgm", "pgd", "freelb"] = "none"
    epsilon: float = Field(default=0.01, gt=0)
    steps: Count = 3
    step_size: float = Field(default=0.4, gt=0)
    neftune: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _moves(self) -> RobustRecipe:
        if self.kind == "freelb" and self.steps < 2:
            raise ValueError("freelb with steps = 1 is the text alone, which has no effect: 2 or more are expected")
        return self


class PenaltyRecipe(Section):
    """Unlikelihood (arXiv:1908.04319): -log(1 - p) of words that should not come.

    repetition: weight of words of the answer so far that are not the next one. listed: weight of what stands in
    `words`, files with a word or phrase a line, from its first token.
    """

    repetition: float = Field(default=0.0, ge=0)
    listed: float = Field(default=0.0, ge=0)
    words: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _with_words(self) -> PenaltyRecipe:
        if bool(self.listed) != bool(self.words):
            raise ValueError("listed is the weight of what stands in the files `words`: give both or none")
        return self


class PseudoLabelRecipe(Section):
    """Unlabelled text that the trained model labels, and learns from where it is sure (Lee 2013). Each round begins
    with the base again.

    source: the text. threshold: the least probability of a label that is believed. rounds: of labelling and training.
    task: of several tasks with labels, the one whose labels it gets. loss_weight: as of a task.
    """

    source: SourceRecipe
    task: str | None = None
    threshold: float = Field(default=0.9, gt=0, lt=1)
    rounds: Count = 1
    loss_weight: float = Field(default=1.0, gt=0)


class EmbeddingRecipe(Section):
    """Embeddings by contrast: a query is to be nearest to its own passage among those of a micro-batch (so
    training.micro_batch says how many there are).

    temperature: cosines are divided by it. symmetric: passages look for their queries, too.
    rows_at_once: texts computed together, and once more for the gradient (GradCache, arXiv:2101.06983), so that a large
        micro-batch fits into memory; 0: all.
    query_prefix, passage_prefix: stand before every text, "query: " and "passage: " of e5. Searching must use the same.
    """

    temperature: float = Field(default=0.05, gt=0)
    symmetric: bool = False
    rows_at_once: int = Field(default=0, ge=0)
    query_prefix: str = ""
    passage_prefix: str = ""


class StageTrainingRecipe(TrainingRecipe):
    """As [training], with values that suit a model that exists. epochs: how often the examples are read; without effect
    where `steps` is given."""

    epochs: float = Field(default=2.0, gt=0)
    steps: int = Field(default=0, ge=0)
    batch_tokens: Count = 4096
    learning_rate: float = Field(default=0.0, ge=0)  # 0: of the adapter's kind, 2e-5 without one
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    warmup: Share = 0.05
    eval_every: Count = 50


class StageRecipe(Section):
    """A model becomes another one.

    kind: "finetune", by examples. name: of its folder in the run's.
    base: the model it begins with, as any command takes it, or a path from the recipe; without it that of the stage
        before, or the one the recipe pretrains.
    objective: "answers" are written by a decoder or an encoder-decoder; "classes" are told and "embeddings" compared by
        an encoder. "auto" follows from the base and the tasks.
    adapter: without it all weights are trained.
    length: tokens of a row, into which several examples go; 0: 512, or what the model can read if that is less.
    too_long, bad_rows: what to do with examples longer than a row, and rows that cannot be read: "stop" and name them,
        or "skip" them, which is counted; texts that an encoder reads may be "cut".
    passage_chars: texts without turns that are longer are cut into passages, as in [data]; 0: never.
    validation: share of the examples kept out of training; of dialogues, by their question. leaks: as in [data].
    mixing_temperature: 1 reads tasks in proportion to their size, larger values more evenly: size to the power 1/T.
    dropout: 0 to 1; -1 keeps the base's. r_drop: as in [objective].
    """

    kind: Literal["finetune"] = "finetune"
    name: str = Field(default="finetune", min_length=1, pattern=r"^[\w.-]+$")
    base: str | None = None
    objective: Literal["auto", "answers", "classes", "embeddings"] = "auto"
    task: tuple[TaskRecipe, ...] = Field(min_length=1)
    adapter: AdapterRecipe | None = None
    replay: ReplayRecipe = ReplayRecipe()
    robust: RobustRecipe = RobustRecipe()
    penalty: PenaltyRecipe = PenaltyRecipe()
    pseudo_labels: PseudoLabelRecipe | None = None
    embedding: EmbeddingRecipe = EmbeddingRecipe()
    clean: CleanRecipe = CleanRecipe(quality=False, min_chars=1, near_duplicates=1.0)
    validation: Share = 0.05
    leaks: Literal["stop", "drop", "warn"] = "drop"
    bad_rows: Literal["stop", "skip"] = "stop"
    too_long: Literal["stop", "skip", "cut"] = "stop"
    length: int = Field(default=0, ge=0)
    passage_chars: int = Field(default=0, ge=0)
    mixing_temperature: float = Field(default=1.0, ge=1)
    dropout: float = Field(default=-1.0, ge=-1, lt=1)
    r_drop: float = Field(default=0.0, ge=0)
    training: StageTrainingRecipe = StageTrainingRecipe()

    @field_validator("passage_chars")
    @classmethod
    def _whole_sentences(cls, count: int) -> int:
        if 0 < count < SHORTEST_PASSAGE:
            raise ValueError(f"passages have {SHORTEST_PASSAGE} characters or more, 0 leaves texts whole")
        return count

    @field_validator("task")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskRecipe, ...]) -> tuple[TaskRecipe, ...]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {twice[0]}")
        if taken := sorted(RESERVED & set(names)):
            raise ValueError(f"a task is called {taken[0]}, as bimo calls text of its own: give it another name")
        return tasks
