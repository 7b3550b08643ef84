"""What is dropped and what stays: poems, definitions and code, which rules made for English web pages drop, stay."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

from bimo.data.filters import make_filters
from bimo.data.records import Document, Message
from bimo.errors import UsageError
from bimo.recipe import CleanRecipe

PROSE_EN = (
    "The committee met on Tuesday to discuss the plan for the harbour. Most members were in favour of it, but two of "
    "them asked for more time to read the report, which had reached them only the evening before."
)
PROSE_ZH = (
    "委员会在星期二开会，讨论港口的规划。大多数成员表示赞成，但有两位要求多一些时间阅读报告，因为他们前一天晚上才收到。"
)
POEM = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
CODE = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / 2\n"


def reasons(text: str, language: str = "", **clean: object) -> dict[str, str]:
    """By which filters a document would be dropped, and why."""
    document = Document(text, "test#1", "test", language)
    found = {name: reason(document) for name, reason in make_filters(CleanRecipe(**clean))}  # type: ignore[arg-type]
    return {name: reason for name, reason in found.items() if reason}


def talk(*turns: str) -> Document:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[place % 2], turn) for place, turn in enumerate(turns))
    return Document("\n".join(turns), "talk#1", "test", messages=messages)


@pytest.mark.parametrize(
    "text",
    [
        PROSE_EN,
        PROSE_ZH,
        POEM,
        POEM.replace("举头", "舉頭").replace("乡", "鄉"),
        "关关雎鸠，在河之洲。窈窕淑女，君子好逑。参差荇菜，左右流之。窈窕淑女，寤寐求之。",
        "bank: a financial institution that accepts deposits",
        "一丝不苟：形容办事认真，连最细微的地方也不马虎。",
        '替代："1.代替。" "2.替身。" 亦作"代替"。',
        "起身：1.出身。 2.站起;起立。 3.动身。 4.起床。",
        "圆的面积公式是 S = πr²，其中 r = 3 时 S ≈ 28.27。",
        "Row, row, row your boat,\nGently down the stream,\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
        CODE,
        "東京の図書館に行きました。とても静かで、本がたくさんありました。",
        "Donaudampfschifffahrtsgesellschaft und Rechtsschutzversicherungsgesellschaften sind lange Wörter.",
        "JavaScript is a language. " + PROSE_EN,
    ],
)
def test_good_texts_stay(text: str) -> None:
    assert reasons(text) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("哈" * 200, "repeats itself"),
        ("buy now! " * 60, "repeats itself"),
        ("点击这里购买优惠商品！" * 30, "repeats itself"),
        ("1 203 4,582 77.1 93.44 18 5,120 7 66.03 8.5 a", "mostly digits"),
        ("-> ## ** ~~ %% @! ?> <| {} [] () // \\\\ ab cd", "mostly symbols"),
        ("★★★★☆【热卖】》》》！！！", "mostly symbols"),
        ("123 456 789 012 345 678", "mostly digits"),
        ("！？。……——、；：“”（）《》【】·～！？", "no letters"),
        ("这是\ufffd\ufffd坏\ufffd掉的文\ufffd本\ufffd，没法读了呀\ufffd", "undecodable characters"),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "placeholder text"),
        ("请在此处输入您的个人简介，不超过二百个字。", "placeholder text"),
        ("Please enable JavaScript to view this page.", "a notice about JavaScript"),
        ("您需要启用 JavaScript 才能正常使用本网站的功能。", "a notice about JavaScript"),
        (" ".join(f"{word}{i}ville" for i in range(60) for word in ("Spring", "Green")), "no function words"),
        ("".join(chr(0x5000 + 7 * i % 2000) for i in range(400)), "no function words"),
        ("\n".join(f"{PROSE_ZH[i : i + 17]}…" for i in range(12)), "lines that are cut off"),
        (
            "\n".join(
                f"{chr(0x4E00 + 31 * i)}{PROSE_ZH[2 * i : 2 * i + 12]}\n今日特价优惠商品活动正在火热进行之中"
                for i in range(9)
            ),
            "repeated lines",
        ),
    ],
)
def test_poor_texts_go(text: str, reason: str) -> None:
    assert reasons(text, "zh" if text[0] > "一" else "en", min_chars=0) == {"quality": reason}


def test_short_documents_go_by_the_recipes_measure() -> None:
    assert reasons("太短了") == {"min_chars": "too few characters"}
    assert reasons("太短了", min_chars=3) == {}
    assert reasons("  \n ", min_chars=0, quality=False) == {}


def test_dialogues_are_judged_leniently() -> None:
    filters = make_filters(CleanRecipe())

    def judge(document: Document) -> list[str]:
        return [found for _, reason in filters if (found := reason(document))]

    assert judge(talk("你好", "你好！")) == []
    assert judge(talk("6*7?", "42 :-)")) == []
    assert judge(talk("Hi", " ")) == ["an empty message"]
    assert judge(talk("说点什么", "好" * 500)) == ["repeats itself"]


def test_languages() -> None:
    assert reasons(PROSE_ZH, languages=("zh",)) == {}
    assert reasons(PROSE_EN, languages=("zh", "en")) == {}
    assert reasons(PROSE_EN, languages=("zh",)) == {"languages": "another language"}
    assert reasons("12345 67890 12345 67890", quality=False, languages=("zh",)) == {"languages": "no language"}
    assert reasons(PROSE_EN, "zh-Hant", languages=("zh",)) == {}  # what the source says holds


def test_personal_data_drops_only_when_asked_to() -> None:
    text = PROSE_ZH + "请联系 13812345678。"
    assert reasons(text, personal_data="drop") == {"personal_data": "personal data"}
    assert reasons(text, personal_data="mask") == {}
    assert reasons(PROSE_EN, personal_data="drop") == {}


@pytest.fixture
def bad_words(tmp_path: Path) -> str:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffass\nclown\nStupid  Fool\n笨蛋\n大笨蛋\n\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("text", "toxic"),
    [
        ("Scunthorpe has a classic class; assess the passage of clowns.", False),
        ("You are an ass and a clown, sir.", True),
        ("what a STUPID FOOL he is, they said", True),
        ("他真是个大笨蛋，笨蛋一个", True),
        ("ass很坏，ass不好，他说的话", True),
        ("熊猫很可爱，竹子很好吃。", False),
    ],
)
def test_toxic_words_are_whole_words_in_english_and_parts_in_chinese(bad_words: str, text: str, toxic: bool) -> None:
    found = reasons(text, quality=False, min_chars=0, toxic=0.05, toxic_words=(bad_words,))
    assert found == ({"toxic": "toxic words"} if toxic else {})


def test_a_long_text_may_cite_a_word(bad_words: str) -> None:
    assert reasons(PROSE_EN + " He called him an ass.", toxic=0.05, toxic_words=(bad_words,)) == {}
    assert reasons(PROSE_EN + " He called him an ass.", toxic=0.0, toxic_words=(bad_words,)) == {"toxic": "toxic words"}
    # 大笨蛋 is one finding of three characters out of ten, not a 笨蛋 more
    assert reasons("大笨蛋一二三四五六七", min_chars=0, toxic=0.3, toxic_words=(bad_words,)) == {}


def test_lists_of_words_that_are_not_there_are_explained(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for files, message in (
        ((), "toxic_words"),
        ((str(tmp_path / "none"),), "cannot be read"),
        ((str(empty),), "no words"),
    ):
        with pytest.raises(UsageError, match=message):
            make_filters(CleanRecipe(toxic=0.1, toxic_words=files))


def test_filters_travel_to_other_processes(bad_words: str) -> None:
    clean = CleanRecipe(toxic=0.05, toxic_words=(bad_words,), languages=("zh",), personal_data="drop")
    filters = pickle.loads(pickle.dumps(make_filters(clean)))
    assert [name for name, _ in filters] == ["min_chars", "languages", "quality", "personal_data", "toxic"]
    document = Document("大笨蛋" + POEM, "a", "b")
    assert [reason(document) for _, reason in filters] == [None, None, None, None, "toxic words"]


@pytest.mark.parametrize(
    "piece", ["", "a", "。", "\x00", "ass ", "笨蛋", "\u0301", "\n", "👨‍👩‍👧", "עברית ", "\ud800", "...\n"]
)
def test_hostile_texts_take_linear_time(bad_words: str, piece: str) -> None:
    clean = CleanRecipe(toxic=0.05, toxic_words=(bad_words,), languages=("zh",), personal_data="drop")
    document = Document(piece * (300_000 // max(1, len(piece))), "a", "b")
    start = time.perf_counter()
    reasons_found = [reason(document) for _, reason in make_filters(clean)]
    assert any(reasons_found)
    assert time.perf_counter() - start < 5
