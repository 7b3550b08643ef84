"""Scores are sacrebleu's, a model translates as its facade answers, and the table holds what was measured."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import bimo
from bimo.backends.facade import Model
from bimo.errors import EngineError, UsageError
from bimo.evaluation.pairs import Pair
from bimo.evaluation.translation import (
    MAX_IN_FLIGHT,
    NUM_BOOTSTRAP,
    ModelTranslator,
    check_prompt,
    evaluate_translation,
    score_translations,
)
from bimo.formats.huggingface import save_directory
from bimo.models.config import Seq2SeqConfig
from bimo.models.seq2seq import EncoderDecoder
from tests.conftest import write_tiny_tokenizer

ENGLISH = ["The cat sat on the mat today.", "Open the file, then close the window.", "Print 3 pages! 🦊"] * 4
CHINESE = ["今天猫坐在垫子上。", "打开文件，然后关闭窗口。", "打印 3 页！🦊"] * 4
WORSE = {"en": ["The cat sat on a mat.", "Close the window.", "Print 3 pages! 🦊"] * 4,
         "zh": ["今天猫坐在垫子旁边。", "关闭窗口。", "打印 3 页！🦊"] * 4}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Iterator[Model]:
    with bimo.load(str(tiny_model_dir), dtype="float32") as model:
        yield model


@pytest.mark.parametrize(("language", "tokenize"), [("en", "13a"), ("zh", "zh"), ("", "13a")])
def test_scores_are_sacrebleu_s(language: str, tokenize: str) -> None:
    import sacrebleu

    references = CHINESE if language == "zh" else ENGLISH
    translations = WORSE[language or "en"]
    score, *signatures = score_translations("it", translations, references, language)
    assert score.bleu == sacrebleu.corpus_bleu(translations, [references], tokenize=tokenize).score
    assert score.chrf == sacrebleu.corpus_chrf(translations, [references]).score
    assert 20 < score.bleu < 90
    assert 0 < score.bleu_interval < 40
    assert 0 < score.chrf_interval < 40
    assert f"tok:{tokenize}" in signatures[0]
    for signature in signatures:
        assert f"bs:{NUM_BOOTSTRAP}" in signature
        assert f"version:{sacrebleu.__version__}" in signature
    assert score_translations("it", translations, references, language)[0] == score  # the same samples every time


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_interval_is_sacrebleu_s(language: str) -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = CHINESE if language == "zh" else ENGLISH
    score, *signatures = score_translations("it", WORSE[language], references, language)
    metrics = (BLEU(tokenize="zh" if language == "zh" else "13a"), CHRF())
    for metric, interval, signature in zip(
        metrics, (score.bleu_interval, score.chrf_interval), signatures, strict=True
    ):
        result = metric.corpus_score(WORSE[language], [references], n_bootstrap=NUM_BOOTSTRAP)
        assert interval == pytest.approx(result._ci, rel=1e-4)
        assert signature == str(metric.get_signature())


def test_samples_of_which_some_score_nothing() -> None:
    score, *_ = score_translations("it", [ENGLISH[0], ""], ENGLISH[:2], "en")
    assert 0 < score.bleu < 100
    assert 20 < score.bleu_interval < 51


def test_the_interval_covers_what_it_should() -> None:
    """Half right, half nothing: by the normal approximation ± 1.96 sd; four times the pairs, half of it."""
    few, many = (
        score_translations("it", [ENGLISH[0], "zzz"] * n, [ENGLISH[0]] * 2 * n, "en")[0].chrf_interval
        for n in (25, 100)
    )
    assert few / many == pytest.approx(2, rel=0.25)


def test_the_best_and_the_worst() -> None:
    for references, language in ((ENGLISH, "en"), (CHINESE, "zh")):
        best, *_ = score_translations("it", references, references, language)
        assert (best.bleu, best.chrf) == pytest.approx((100, 100))
        assert (best.bleu_interval, best.chrf_interval) == (0, 0)
        for nothing in ("", "\x00", "🐶" * 10_000):
            worst, *_ = score_translations("it", [nothing] * len(references), references, language)
            assert worst.chrf == pytest.approx(0, abs=0.5)
            assert worst.bleu < 5
    one, *_ = score_translations("it", ["猫"], ["猫"], "zh")
    assert one.chrf == 100


def test_lists_that_do_not_match() -> None:
    for translations, references in (([], []), (["a"], []), ([], ["a"]), (["a"], ["a", "b"])):
        with pytest.raises(UsageError, match="references need as many translations"):
            score_translations("it", translations, references, "en")


def test_text_that_looks_tokenized_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        score_translations("it", ["a cat ."] * 200, ["a cat."] * 200, "en")
    assert not caplog.records


def test_the_table() -> None:
    training = [Pair(*both) for both in zip(ENGLISH[:2], CHINESE[:2], strict=True)]
    pairs = [Pair(*both) for both in zip(ENGLISH, CHINESE, strict=True)]
    asked: list[Sequence[str]] = []

    def translate(sources: Sequence[str]) -> list[str]:
        asked.append(sources)
        return WORSE["zh"]

    table = evaluate_translation(translate, pairs, name="猫", training_pairs=training)
    assert asked == [ENGLISH]
    assert (table.num_pairs, table.num_known) == (12, 8)
    assert (table.source_language, table.target_language) == ("en", "zh")
    assert "tok:zh" in table.bleu_signature
    mine, memory, lexicon = table.scores
    assert [score.name for score in table.scores] == ["猫", "translation memory", "word by word"]
    assert mine == score_translations("猫", WORSE["zh"], CHINESE, "zh")[0]
    assert mine.bleu < memory.bleu < 100  # it knows two of the three sentences
    assert lexicon.chrf > 0
    head, *rows = table.lines()
    assert head.split() == ["TRANSLATOR", "BLEU", "CHRF"]
    assert [float(cell) for cell in rows[0].replace("±", " ").split()[1:]] == pytest.approx(
        [mine.bleu, mine.bleu_interval, mine.chrf, mine.chrf_interval], abs=0.006
    )
    alone = evaluate_translation(translate, pairs, target_language="en")
    assert len(alone.scores) == 1
    assert "tok:13a" in alone.bleu_signature
    with pytest.raises(UsageError, match="no pairs"):
        evaluate_translation(translate, [])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", [None, "{source}", "把它译成中文：{source}"])
def test_a_decoder_is_asked_as_a_user_would(prompt: str | None, beams: int, model: Model) -> None:
    translate = ModelTranslator(model.backend, languages=("en", "zh"), beams=beams, prompt=prompt, max_tokens=12)
    search = {"num_beams": 3} if beams == 3 else {"temperature": 0}
    expected = []
    for source in ENGLISH[:3]:
        text = (prompt or "Translate into Chinese: {source}").replace("{source}", source)
        expected.append(model.chat(text, max_tokens=12, **search).text.strip())
    assert translate(ENGLISH[:3]) == expected


def test_a_decoder_without_a_template_goes_on_with_the_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with bimo.load(str(folder), dtype="float32") as model:
        assert model.tokenizer.chat_template is None
        found = ModelTranslator(model.backend, languages=("en", "zh"), max_tokens=20)(ENGLISH[:2])
        prompts = [f"English: {source}\nChinese:" for source in ENGLISH[:2]]
        expected = [model.generate(prompt, max_tokens=20, temperature=0, stop="\n").text for prompt in prompts]
        assert found == [text.strip() for text in expected]


def write_encoder_decoder(folder: Path) -> None:
    """A tiny random one with the tiny tokenizer."""
    generator = torch.Generator().manual_seed(0)
    config = Seq2SeqConfig(
        vocab_size=write_tiny_tokenizer(folder.parent / "tokenizer"),
        hidden_size=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_positions=128,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = EncoderDecoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 3.0 if "cross" in name else 0.3  # so that the source is what decides
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + ("norm" in name))
    save_directory(folder, config, model.named_parameters(), source=folder.parent / "tokenizer")


def test_an_encoder_decoder_reads_the_source_itself(tmp_path: Path) -> None:
    write_encoder_decoder(tmp_path / "model")
    with bimo.load(str(tmp_path / "model"), dtype="float32") as model:
        for settings, search in (({}, {"temperature": 0}), ({"beams": 3}, {"num_beams": 3})):
            expected = [model.generate(source, max_tokens=9, **search).text.strip() for source in ENGLISH[:3]]
            assert ModelTranslator(model.backend, max_tokens=9, **settings)(ENGLISH[:3]) == expected
        assert len(set(expected)) > 1  # it does look at the source
        asked = ModelTranslator(model.backend, max_tokens=9, prompt="translate English to Chinese: {source}")
        whole = model.generate(f"translate English to Chinese: {ENGLISH[0]}", max_tokens=9)
        assert asked(ENGLISH[:1]) == [whole.text.strip()]
        translate = ModelTranslator(model.backend, max_tokens=9)
        assert translate(["猫" * 500]) == [""]
        assert translate.num_too_long == 1


def test_many_sentences_in_order_and_told_of(model: Model) -> None:
    sources = [f"{n} 猫 cat" for n in range(MAX_IN_FLIGHT + 20)]
    told: list[tuple[int, int]] = []
    translate = ModelTranslator(
        model.backend, prompt="{source}", max_tokens=2, progress=lambda done, total: told.append((done, total))
    )
    translations = translate(sources)
    assert len(translations) == len(sources)
    assert translations[::25] == [
        model.chat(source, max_tokens=2, temperature=0).text.strip() for source in sources[::25]
    ]
    assert told[-1] == (len(sources), len(sources))
    assert told == sorted(told)
    assert translate([]) == []


def test_sources_that_do_not_fit(model: Model) -> None:
    translate = ModelTranslator(model.backend, max_tokens=2)
    huge = "翻译这一行。" * 4000
    found = translate([huge, ENGLISH[0], huge])
    assert found[::2] == ["", ""]
    assert found[1] == translate(ENGLISH[:1])[0]
    assert translate.num_too_long == 0  # of the last call
    translate([huge, huge, "a"])
    assert translate.num_too_long == 2


def test_no_end_is_forced(model: Model) -> None:
    """A model that never stops is stopped at three times the length of the source, and 32."""
    source = "cat"
    num_tokens = len(model.tokenizer.encode(source, add_special_tokens=False))
    found = ModelTranslator(model.backend, prompt="{source}")([source])
    longest = model.chat(source, temperature=0, max_tokens=3 * num_tokens + 32)
    assert found == [longest.text.strip()]
    assert longest.finish_reason == "length"


def test_wrong_wishes(model: Model) -> None:
    for prompt in ("", "translate", "{Source}", "{0}"):
        with pytest.raises(UsageError, match="must hold"):
            check_prompt(prompt)
    for prompt in ("", "translate it"):
        with pytest.raises(UsageError, match="must hold"):
            ModelTranslator(model.backend, prompt=prompt)
    with pytest.raises(UsageError, match="num_beams"):
        ModelTranslator(model.backend, beams=10_000)(["a"])


def test_a_closed_model_says_so(tiny_model_dir: Path) -> None:
    model = bimo.load(str(tiny_model_dir), dtype="float32")
    model.close()
    with pytest.raises(EngineError):
        ModelTranslator(model.backend)(["a"])
