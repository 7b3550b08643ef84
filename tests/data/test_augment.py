"""Copies keep answers, labels and where they come from; they are the same in any order and process, and never the
original."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from bimo.data.augment import KINDS, Augmenter, copy_kind, insertions, replacements, swaps
from bimo.data.noise import question_of
from bimo.data.records import Document, Message
from bimo.data.synonyms import Synonyms
from bimo.data.words import cut, kept
from bimo.errors import DownloadError, UsageError
from bimo.recipe import AugmentRecipe

LIST = "打开 开启\n文件 档案\n怎么 怎样 如何\n电脑 计算机\nOpen unlock\nopen unlock\nwindow pane\n"


def silent(label: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture
def listed(tmp_path: Path) -> str:
    (tmp_path / "list.txt").write_text(LIST, encoding="utf-8")
    return str(tmp_path / "list.txt")


@pytest.fixture
def synonyms(listed: str, monkeypatch: pytest.MonkeyPatch) -> Synonyms:
    """The list alone: what it does not have has no synonyms."""
    found = Synonyms([listed], silent)
    monkeypatch.setattr(found, "_wordnet", type("Nothing", (), {"synonyms": lambda self, word, before: []})())
    return found


def documents() -> list[Document]:
    return [
        Document("怎么打开这个文件？我的电脑坏了，请发到[EMAIL]。", "faq.csv#1", "faq", label="help"),
        Document("怎么在电脑上打开 read_file() 的300个文件？", "faq.csv#2", "faq", group="page"),
        Document(
            "怎么打开文件\n点一下它",
            "chat#3",
            "chat",
            messages=(
                Message("user", "怎么打开文件"),
                Message("assistant", "打开文件即可"),
                Message("user", "怎么打开电脑里的文件"),
                Message("assistant", "打开电脑里的文件即可"),
            ),
        ),
    ]


def augmenter(listed: str, **shares: object) -> Augmenter:
    ways = {"swap": 0.3, "delete": 0.2, "synonyms": 0.3, "insert": 0.2} | shares
    return Augmenter.of(AugmentRecipe(copies=4, synonym_files=(listed,), **ways), 1, silent)


def test_copies_say_where_they_come_from_and_keep_answers_and_labels(listed: str) -> None:
    made = augmenter(listed)
    for document in documents():
        copies = list(made.augment(document))
        assert len(copies) == 4
        assert {copy.id for copy in copies} == {
            f"{document.id}+{kind}" for kind in ("synonyms", "insert", "swap", "delete")
        }
        texts = {question_of(copy) for copy in copies}
        assert len(texts) == 4 and question_of(document) not in texts
        for copy in copies:
            assert (copy.source, copy.group, copy.label) == (document.source, document.group, document.label)
            assert kept(question_of(copy)) == kept(question_of(document))
            assert len(copy.messages) == len(document.messages)
            for place, (old, new) in enumerate(zip(document.messages, copy.messages, strict=True)):
                assert old.role == new.role and (place == 2 or old == new)
            if copy.messages:
                assert copy.text == "\n".join(message.content for message in copy.messages)
    assert made.copies == Counter(synonyms=3, insert=3, swap=3, delete=3) and not made.dropped


def test_copies_are_the_same_in_any_order_and_process(listed: str) -> None:
    def all_of(some: list[Document]) -> dict[str, str]:
        made = augmenter(listed)
        return {copy.id: question_of(copy) for document in some for copy in made.augment(document)}

    expected = all_of(documents())
    assert all_of(documents()[::-1]) == expected
    script = (
        "from tests.data.test_augment import *\n"
        f"made = augmenter({listed!r})\n"
        "print({c.id: question_of(c) for d in documents() for c in made.augment(d)} == eval(input()))"
    )
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, input=ascii(expected), text=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "True\n", done.stderr
    other = Augmenter.of(AugmentRecipe(copies=4, swap=0.3), 2, silent)
    same = Augmenter.of(AugmentRecipe(copies=4, swap=0.3), 1, silent)
    assert [c.text for c in other.augment(documents()[0])] != [c.text for c in same.augment(documents()[0])]


@pytest.mark.parametrize("text", ["", "  \n", "300", "[EMAIL] https://example.org", "😀👍", "你", "ok"])
def test_what_cannot_be_altered_has_no_copy_and_is_counted(listed: str, text: str) -> None:
    made = augmenter(listed)
    assert list(made.augment(Document(text, "a", "s"))) == []
    assert made.dropped == Counter({"nothing to alter": 1}) and not made.copies


def test_kinds_that_do_not_suit_give_way(listed: str) -> None:
    made = Augmenter.of(AugmentRecipe(copies=3, typos=0.3, swap=0.3), 0, silent)
    copies = list(made.augment(documents()[0]))
    assert [copy.id.partition("+")[2] for copy in copies] == ["swap", "swap2", "swap3"]  # no typos in Chinese
    assert len({copy.text for copy in copies}) == 3
    few = Augmenter.of(AugmentRecipe(copies=9, delete=0.1), 0, silent)
    assert {copy.text for copy in few.augment(Document("打开文件", "a", "s"))} == {"打开", "文件"}


def test_the_kinds_are_the_recipes() -> None:
    assert set(KINDS) == set(AugmentRecipe.model_fields) - {"copies", "synonym_files", "back_translation", "similarity"}


def test_the_instruction_around_a_question_stays(listed: str) -> None:
    recipe = AugmentRecipe(copies=2, synonyms=1.0, synonym_files=(listed,))
    made = Augmenter.of(recipe, 0, silent, instruction="打开文件：{prompt}（电脑）")
    asked = Message("user", "打开文件：怎么打开（电脑）")
    document = Document("", "a", "s", messages=(asked, Message("assistant", "x")))
    copies = [question_of(copy) for copy in made.augment(document)]
    assert copies and all(text.startswith("打开文件：") and text.endswith("开启（电脑）") for text in copies)


def test_synonyms_keep_capitals_and_leave_names(synonyms: Synonyms) -> None:
    def altered(text: str) -> str:
        return replacements(synonyms, cut(text), 1.0, Random(0))

    assert altered("Open the window. Window seats open.") == "unlock the pane. Pane seats unlock."
    assert altered("The Window firm") == "The Window firm"
    assert altered("OPEN THE WINDOW") == "UNLOCK THE PANE"
    assert altered("打开文件，close it") == "开启档案，close it"
    assert replacements(synonyms, cut("打开文件"), 0.0, Random(0), 1) in ("开启文件", "打开档案")
    assert replacements(synonyms, cut("关门"), 1.0, Random(0), 1) == "关门"


def test_insertions_add_synonyms_only(synonyms: Synonyms) -> None:
    for seed in range(20):
        english = insertions(synonyms, cut("please open the window"), 0.25, Random(seed), 1)
        added = Counter(english.split()) - Counter(["please", "open", "the", "window"])
        assert set(added) <= {"unlock", "pane"} and added.total() == 1
        assert insertions(synonyms, cut("打开电脑"), 0.0, Random(seed), 1) in {
            "开启打开电脑", "打开开启电脑", "计算机打开电脑", "打开计算机电脑"
        }  # fmt: skip


def test_swaps_keep_every_word_and_the_capital_of_a_sentence() -> None:
    text = "Close window and door, 今天天气很好 at 5 pm."
    found = {swaps(cut(text), 0.0, Random(seed), 1) for seed in range(30)}
    assert len(found) > 5 and text not in found
    for swapped in found:
        old, new = cut(text), cut(swapped)
        assert sorted(word.lower() for word in (old.parts[i] for i in old.spaced)) == sorted(
            word.lower() for word in (new.parts[i] for i in new.spaced)
        )
        assert sorted(swapped.lower()) == sorted(text.lower())
        assert swapped[0].isupper()
        assert "5" in swapped
    assert swaps(cut("go go go"), 1.0, Random(0), 1) == "go go go"  # two equal words: nothing to swap


def test_english_copies_come_from_wordnet(listed: str) -> None:
    made = Augmenter.of(AugmentRecipe(copies=1, synonyms=0.5), 0, silent)
    try:
        (copy,) = made.augment(Document("The big cars stopped quickly at the shop on Monday.", "a", "s"))
    except DownloadError as error:
        pytest.skip(f"WordNet cannot be fetched: {error}")
    words = copy.text.split()
    assert len(words) == 10 and words[0] == "The" and "Monday." in words
    assert set(words) & {"large", "automobiles", "motorcars", "halted", "ceased", "discontinued", "rapidly", "speedily"}


# --- back-translation -------------------------------------------------------------------------------------------------


def translator(table: dict[str, str], calls: list[int] | None = None) -> Callable[[list[str]], list[str]]:
    def translate(texts: list[str]) -> list[str]:
        if calls is not None:
            calls.append(len(texts))
        return [table.get(text, text) for text in texts]

    return translate


def test_back_translation_goes_there_and_back_in_batches() -> None:
    made = Augmenter.of(AugmentRecipe(back_translation=("zh-en", "en-zh"), similarity=0.0), 0, silent)
    texts = ["你好吗", "请打开文件", "谢谢你", "共300元", "再见了", "好吧好吧", "Hello there"]
    there = {text: f"en {text}" for text in texts}
    back = {
        "en 你好吗": " 您还好吗\n",
        "en 请打开文件": "请打开  文件".replace("  ", ""),  # the same
        "en 谢谢你": "  ",
        "en 共300元": "一共三百元",
        "en 再见了": "再见" * 50,
        "en 好吧好吧": "可以",
    }
    calls: list[int] = []
    some = [Document(text, f"d{place}", "s", label="x") for place, text in enumerate(texts)]
    copies = list(made.back_translate(some, translator(there, calls), translator(back), language="zh-CN", batch=4))
    assert [(copy.id, copy.text, copy.label) for copy in copies] == [
        ("d0+back_translation", "您还好吗", "x"),
        ("d5+back_translation", "可以", "x"),
    ]
    assert calls == [4, 2]
    assert [copy_kind(name) for name in (copies[0].id, "d7+typos2", "a+b")] == ["back_translation", "typos", None]
    assert made.copies == Counter(back_translation=2)
    assert made.dropped == Counter(
        {"identical": 1, "empty": 1, "loses what must stay": 1, "far longer": 1, "another language": 1}
    )
    assert list(made.augment(some[0])) == []  # no word is altered where no share is given


def test_back_translation_of_dialogues_and_of_instructions() -> None:
    recipe = AugmentRecipe(back_translation=("a", "b"), similarity=0.2)
    made = Augmenter.of(recipe, 0, silent, instruction="Translate: {prompt}")
    chat = Document("", "c", "s", messages=(Message("user", "Translate: good day"), Message("assistant", "你好")))
    (copy,) = made.back_translate([chat], translator({"good day": "你好"}), translator({"你好": "fine day"}))
    assert copy.messages == (Message("user", "Translate: fine day"), Message("assistant", "你好"))


def test_back_translations_that_mean_something_else_are_dropped() -> None:
    made = Augmenter.of(AugmentRecipe(back_translation=("a", "b")), 0, silent)
    texts = ["Specifies the position of the address", "Click in your document", "请先打开这个文件", "怎样保存文件？"]
    back = [
        "Specifies the address address address",
        "Click  on your Document",
        "请打开这个文件吧",
        "打印机在哪里？",
    ]
    some = [Document(text, f"d{place}", "s") for place, text in enumerate(texts)]
    copies = made.back_translate(some, translator({}), translator(dict(zip(texts, back, strict=True))))
    assert [copy.text for copy in copies] == [*back[:3]]
    assert made.dropped == Counter({"too different": 1})


def test_a_translator_that_loses_texts_is_told() -> None:
    made = Augmenter.of(AugmentRecipe(back_translation=("a", "b")), 0, silent)
    with pytest.raises(UsageError, match="a translation for each text, got 1 for 2"):
        list(made.back_translate(documents()[:2], lambda texts: texts[:1], translator({})))
    assert list(made.back_translate([], translator({}), translator({}))) == []


def test_a_recipe_that_alters_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="names no way to alter a text"):
        AugmentRecipe(copies=2)
    with pytest.raises(ValidationError, match="synonym_files have no effect"):
        AugmentRecipe(swap=0.1, synonym_files=("a.txt",))
    tried = AugmentRecipe(synonyms=0.0)  # one of the values of a search
    assert list(Augmenter.of(tried, 0, silent).augment(documents()[0])) == []


def test_sets_that_cannot_be_fetched_are_told_before_the_first_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="pycorrector"):
        Augmenter.of(AugmentRecipe(shapes=0.1), 0, silent)
