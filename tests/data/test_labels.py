"""Texts with classes: how classes of one and of several tasks are named, what a batch holds, what is refused by name;
pseudo-labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bimo.data.labels import (
    LabelLoader,
    Labels,
    PseudoTally,
    check_labels,
    encode_labelled,
    label_set,
    pseudo_labels,
)
from bimo.data.loader import IGNORED
from bimo.data.records import Document
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import DataError, UsageError
from bimo.tokenizer.load import Tokenizer
from tests.encoders import TEXTS, make_encoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(make_encoder(tmp_path_factory.mktemp("encoder") / "tiny"))


def labelled(text: str, label: str, task: str = "t", name: str = "表.csv#1") -> Document:
    return Document(text, name, task, label=label)


LANGUAGES = [labelled(text, code, "language", f"{code}#{n}") for code in TEXTS for n, text in enumerate(TEXTS[code])]
LENGTHS = [
    labelled(text, "短" if len(text) < 20 else "long", "length", f"长#{n}")
    for n, text in enumerate(text for some in TEXTS.values() for text in some)
]


def fail(name: str, why: str) -> None:
    raise AssertionError(f"{name} {why}")


def loader_of(
    parts: Sequence[list[Document]], labels: Labels, tokenizer: Tokenizer, folder: Path, **settings: object
) -> LabelLoader:
    files = []
    for number, documents in enumerate(parts):
        encoded = encode_labelled(documents, tokenizer, labels, max_tokens=64, refuse=fail)
        write_tokens(folder / str(number), encoded, vocab_size=tokenizer.vocab_size, mark="")
        files.append(TokenFile.open(folder / str(number)))
    return LabelLoader(files, labels=labels, length=64, seed=0, **settings)


def test_classes_of_one_task_have_plain_names() -> None:
    labels = label_set(LANGUAGES)
    assert labels.names == labels.plain == ("en", "zh") and labels.tasks == ("", "")
    assert labels.number("language", "zh") == labels.number("anything", "zh") == 1
    assert labels.number("language", "fr") is None
    assert labels.of() == [0, 1] and labels.together.all()
    with pytest.raises(UsageError, match="no task 'x', it has none by name"):
        labels.of("x")


def test_classes_of_several_tasks_are_kept_apart() -> None:
    documents = [labelled("a", "1", "spam"), labelled("b", "0", "spam"), labelled("c", "1", "情感"),
                 labelled("d", "0", "情感"), labelled("e", "也许::是", "情感")]  # fmt: skip
    labels = label_set(documents)
    assert labels.names == ("spam::0", "spam::1", "情感::0", "情感::1", "情感::也许::是")
    assert Labels(labels.names).tasks == ("spam", "spam", "情感", "情感", "情感")
    assert labels.number("spam", "1") == 1 and labels.number("情感", "也许::是") == 4
    assert labels.number("other", "1") is None
    assert labels.of("情感") == [2, 3, 4]
    assert labels.together.tolist() == [[True, True, False, False, False]] * 2 + [[False, False, True, True, True]] * 3
    with pytest.raises(UsageError, match="spam, 情感 apart: say which task"):
        labels.of()
    with pytest.raises(UsageError, match="no task 'topic', it has spam, 情感"):
        labels.of("topic")


def test_a_plain_name_that_looks_like_two_is_read_back_as_one() -> None:
    labels = label_set([labelled("a", "sport::ball"), labelled("b", "news::ball")])
    assert Labels(labels.names).plain == ("news::ball", "sport::ball") and set(labels.tasks) == {"t"}
    assert labels.number("t", "sport::ball") == 1 and labels.number("pseudo", "sport::ball") == 1


def test_what_cannot_be_learned_is_named() -> None:
    with pytest.raises(DataError, match=r"表\.csv#1 has no class"):
        label_set([labelled("a", " ")])
    with pytest.raises(DataError, match="all training texts of t are 'ham'"):
        label_set([labelled("a", "ham"), labelled("b", "ham")])
    with pytest.raises(DataError, match="no labelled text"):
        label_set([])


def test_classes_seen_in_validation_only_are_named_with_their_place() -> None:
    train = [labelled("a", "ham"), labelled("b", "spam")]
    validation = [labelled("c", "ham"), labelled("d", "Spma", name="v.csv#7"), labelled("e", "垃圾", name="v.csv#9"),
                  labelled("f", "垃圾", name="v.csv#12")]  # fmt: skip
    with pytest.raises(DataError) as found:
        label_set(train, validation)
    assert "2 classes stand in validation only" in str(found.value)
    assert "'Spma' (v.csv#7, did you mean 'spam'?)" in str(found.value)
    assert "'垃圾' (v.csv#9 and 1 more)" in str(found.value)
    check_labels(validation[:1], label_set(train))
    several = [labelled(text, label, task) for task in ("en", "zh") for text, label in (("a", "ham"), ("b", task))]
    with pytest.raises(DataError) as found:  # another task's class is no help
        label_set(several, [labelled("c", "zh", "en", name="en/c")])
    assert "'zh' (en/c)" in str(found.value)


def test_examples_become_batches_and_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    labels = label_set(LANGUAGES)
    loader = loader_of([LANGUAGES], labels, tokenizer, tmp_path)
    batch = loader.next_batch(len(LANGUAGES))
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.mask, strict=True)]
    told = {row: labels.names[target] for row, target in zip(rows, batch.targets, strict=True)}
    assert told == {tuple(tokenizer.encode(document.text)): document.label for document in LANGUAGES}
    assert [len(row) for row in rows] == sorted(len(row) for row in rows) and batch.input_ids.shape[1] % 16 == 0
    assert set(loader.provenance(batch)) == {document.id for document in LANGUAGES}
    assert batch.num_targets == len(batch) == 10 and batch.allowed.all() and (batch.weights == 1).all()
    part = batch.rows(slice(0, 2))
    assert part.input_ids.shape[1] <= batch.input_ids.shape[1] and part.targets.tolist() == batch.targets[:2].tolist()
    assert part.origins == batch.origins[:2] and part.mask.sum() == batch.mask[:2].sum()
    idle = batch.idle()
    assert idle.num_targets == 0 and idle.targets.tolist() == [IGNORED] and not idle.mask.any()
    assert loader.row_tokens == round(np.mean([len(row) + 1 for row in rows]))


def test_the_stream_resumes_and_is_divided_between_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    labels = label_set([*LANGUAGES, *LENGTHS])
    parts = [LANGUAGES, LENGTHS[:3]]

    def make() -> LabelLoader:
        return loader_of(parts, labels, tokenizer, tmp_path, loss_weights=[1.0, 3.0])

    one, two, whole = make(), make(), make()
    both = [one.next_batch(6, rank=0, world_size=2), two.next_batch(6, rank=1, world_size=2)]
    batch = whole.next_batch(6)
    assert sorted(origin for half in both for origin in half.origins) == sorted(batch.origins)
    known = dict(zip(batch.origins, batch.weights.tolist(), strict=True))
    assert all(known[o] == w for half in both for o, w in zip(half.origins, half.weights.tolist(), strict=True))
    again = make()
    again.restore(whole.state())
    assert again.next_batch(4).origins == whole.next_batch(4).origins


def test_weights_make_the_joint_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A mean over all texts with these factors is the weighted mean of each task's own mean."""
    labels = label_set([*LANGUAGES, *LENGTHS])
    loader = loader_of([LANGUAGES, LENGTHS[:3]], labels, tokenizer, tmp_path, loss_weights=[1.0, 3.0])
    batch = loader.next_batch(9)
    losses, files = np.random.default_rng(0).random(9), np.array([origin.file for origin in batch.origins])
    assert 0 < files.sum() < 9
    stated = (1.0 * losses[files == 0].mean() + 3.0 * losses[files == 1].mean()) / 4
    assert (losses * batch.weights).sum() / 9 == pytest.approx(stated, rel=1e-6)
    tasks = np.array(labels.tasks)
    for target, allowed in zip(batch.targets, batch.allowed, strict=True):
        assert (allowed == (tasks == tasks[target])).all()


def test_what_cannot_be_used_is_named(tokenizer: Tokenizer) -> None:
    labels = label_set([labelled("a", "好"), labelled("b", "坏")])
    said: list[tuple[str, str]] = []
    documents = [labelled(" \n", "好", name="a"), labelled("墨", "好的", name="b"), labelled("字" * 99, "坏", name="c"),
                 labelled("[CLS] 🦊 \u200b", "坏", name="d")]  # fmt: skip
    encoded = list(encode_labelled(documents, tokenizer, labels, max_tokens=20, refuse=lambda *what: said.append(what)))
    assert [name for name, _ in encoded] == ["d", "d"] and encoded[1][1].tolist() == [labels.names.index("坏")]
    assert (encoded[0][1][1:-1] != tokenizer.backend.token_to_id("[CLS]")).all()
    assert [name for name, _ in said] == ["a", "b", "c"]
    assert said[0][1] == "has no text" and said[1][1] == "is '好的', which no training text is"
    assert said[2][1] == "has 101 tokens, 20 are read"
    cut: list[str] = []
    encoded = list(
        encode_labelled(documents[2:3], tokenizer, labels, max_tokens=20, refuse=fail,
                        shorten=lambda name, _: cut.append(name))
    )  # fmt: skip
    assert cut == ["c"] and len(encoded[0][1]) == 20
    with pytest.raises(UsageError, match="classes are more than the vocabulary's"):
        list(encode_labelled([], tokenizer, Labels(tuple(map(str, range(9999)))), max_tokens=9, refuse=fail))


def test_tokens_of_other_classes_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    many = label_set([labelled("a", str(n), name=str(n)) for n in range(5)])
    encoded = encode_labelled([labelled("a", "4")], tokenizer, many, max_tokens=20, refuse=fail)
    file = write_tokens(tmp_path / "t", encoded, vocab_size=tokenizer.vocab_size, mark="")
    with pytest.raises(DataError, match="class number 4, there are 2 classes"):
        LabelLoader([file], labels=Labels(("a", "b")), length=20).next_batch(1)


def test_padding_ends_where_the_model_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Lengths are rounded up to whole 16s, but a model of 50 positions reads no 64."""
    labels = Labels(("a", "b"))
    encoded = encode_labelled([labelled("字" * 48, "b")], tokenizer, labels, max_tokens=50, refuse=fail)
    file = write_tokens(tmp_path / "t", encoded, vocab_size=tokenizer.vocab_size, mark="")
    batch = LabelLoader([file], labels=labels, length=50).next_batch(1)
    assert batch.input_ids.shape == (1, 50) and batch.mask.all() and batch.rows(slice(0, 1)).mask.shape == (1, 50)


def test_no_texts_are_no_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t", [], vocab_size=9, mark="")
    with pytest.raises(UsageError, match="no source has text"):
        LabelLoader([file], labels=Labels(("a", "b")), length=20)


class Sure:
    """Says "x" with the probability that the text spells."""

    labels = Labels(("a::x", "a::y", "b::z", "b::w"))

    def probabilities(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        assert len(self.labels.of(task)) == 2
        chances = np.array([float(text) for text in texts], np.float32)
        return np.stack((chances, 1 - chances), 1)


def test_pseudo_labels_are_kept_where_the_model_is_sure() -> None:
    documents = [
        Document(text, f"网页#{n}", "web", title="T") for n, text in enumerate(["0.95", "0.6", " ", "0.02", "0.9"])
    ]
    tally = PseudoTally()
    kept = list(pseudo_labels(Sure(), documents, 0.9, tally=tally, task="a"))
    assert [(one.id, one.label, one.source, one.title) for one in kept] == [
        ("网页#0+pseudo", "x", "a", "T"),
        ("网页#3+pseudo", "y", "a", "T"),
        ("网页#4+pseudo", "x", "a", "T"),
    ]
    assert tally == PseudoTally(Counter(x=2, y=1), unsure=1, empty=1)
    assert documents[0].label == "" and documents[0].id == "网页#0"
    broken = PseudoTally()
    assert not list(pseudo_labels(Sure(), [Document("nan", "n", "web")], 0.9, tally=broken, task="a"))
    assert broken.unsure == 1
    with pytest.raises(UsageError, match="say which task"):
        list(pseudo_labels(Sure(), documents, 0.9, tally=tally))
