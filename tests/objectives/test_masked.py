"""BERT's objectives: which words are hidden, how often, what a guess costs, and which sentences are paired."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import pytest
import torch

from bimo.errors import MissingDependencyError, UsageError
from bimo.objectives.masked import (
    IGNORED,
    mask_tokens,
    masked_loss,
    next_sentence_loss,
    word_numbers,
)

VOCAB, MASK, SPECIAL = 1000, 4, [0, 1, 2, 3]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(num_rows: int = 200, num_tokens: int = 100) -> torch.Tensor:
    """[CLS] words [SEP] padding, the padding longer from row to row."""
    ids = torch.randint(5, VOCAB, (num_rows, num_tokens), generator=generator(9))
    ids[:, 0] = 1
    for row, padding in enumerate(torch.linspace(1, num_tokens - 10, num_rows).long().tolist()):
        ids[row, -padding - 1] = 2
        ids[row, -padding:] = 0
    return ids


def mask(ids: torch.Tensor, seed: int = 0, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"special_ids": SPECIAL, "mask_id": MASK, "vocab_size": VOCAB, "generator": generator(seed)} | options
    return mask_tokens(ids, **settings)


# ------------------------------------------------------------------------------------------------------------- masking
def test_shares_are_berts() -> None:
    ids = rows()
    before = ids.clone()
    masked, labels = mask(ids)
    assert torch.equal(ids, before)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert not torch.isin(ids[chosen], torch.tensor(SPECIAL)).any()
    ordinary = (ids > 4).sum(1)
    assert ((chosen.sum(1) - 0.15 * ordinary).abs() <= 0.5 + 1e-6).logical_or(chosen.sum(1) == 1).all()
    count = chosen.sum().item()
    hidden, kept = (masked[chosen] == MASK).float().mean(), (masked[chosen] == ids[chosen]).float().mean()
    for value, share in ((hidden, 0.8), (kept, 0.1), (1 - hidden - kept, 0.1)):
        assert abs(value - share) < 4 * math.sqrt(share * (1 - share) / count)  # four standard deviations
    drawn = masked[chosen & (masked != MASK) & (masked != ids)]
    assert drawn.min() > 4 and len(drawn.unique()) > 0.7 * len(drawn) and drawn.max() > 900


def test_every_place_is_as_likely_as_another() -> None:
    ids = torch.randint(5, VOCAB, (4000, 20), generator=generator(1))
    chosen = (mask(ids)[1] != IGNORED).float()
    assert (chosen.mean(0) - 0.15).abs().max() < 4 * math.sqrt(0.15 * 0.85 / 4000)


def test_the_generator_alone_decides() -> None:
    ids = rows(20)
    torch.manual_seed(1)
    first = mask(ids, 3)
    torch.manual_seed(2)
    second, other = mask(ids, 3), mask(ids, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    going_on = generator(3)
    assert torch.equal(mask(ids, generator=going_on)[1], first[1])
    assert not torch.equal(mask(ids, generator=going_on)[1], first[1])  # the next epoch hides other words


def test_short_and_empty_rows() -> None:
    ids = torch.tensor([[1, 7, 2, 0], [1, 2, 0, 0], [1, 8, 9, 2]])
    labels = mask(ids)[1]
    assert (labels != IGNORED).sum(1).tolist() == [1, 0, 1]  # at least one, and none where there is no word
    assert mask(torch.zeros(2, 0, dtype=torch.long))[0].shape == (2, 0)
    everything = mask(ids, share=1.0)[1]
    assert (everything != IGNORED).sum(1).tolist() == [1, 0, 2]


def test_whole_words_are_hidden_together() -> None:
    ids = torch.randint(5, VOCAB, (300, 60), generator=generator(2))
    words = torch.arange(60).expand(300, 60) // 3  # three pieces each
    words = torch.where(torch.arange(60) % 10 == 9, -1, words)  # some belong to no word
    labels = mask(ids, word_ids=words)[1]
    chosen = labels != IGNORED
    for row, row_words in zip(chosen, words, strict=True):
        for word in range(20):
            assert row[row_words == word].float().mean() in (0, 1)
    loose = chosen[:, 9::10]
    assert 0.08 < loose.float().mean() < 0.25 and loose.any(1).sum() < 250  # each drawn for itself
    assert abs(chosen.float().mean() - 0.15) < 0.01  # counted in pieces, not in words


def test_a_word_longer_than_the_share_is_still_hidden_whole() -> None:
    ids = torch.arange(5, 13)[None]
    labels = mask(ids, word_ids=torch.zeros(1, 8, dtype=torch.long))[1]
    assert torch.equal(labels, ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"share": 1.5}, "share must be above 0"),
        ({"word_ids": torch.zeros(2, 2)}, r"word_ids has the shape \(2, 2\)"),
        ({"mask_id": VOCAB}, "mask_id and special_ids must be from 0 to 999"),
        ({"special_ids": [-1]}, "mask_id and special_ids must be from 0 to 999"),
        ({"vocab_size": 5}, "all 5 tokens are special"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mask(torch.tensor([[1, 7, 2]]), **options)


# --------------------------------------------------------------------------------------------------------------- words
def pieces(text: str, *parts: str) -> list[tuple[int, int]]:
    """Where the parts stand in the text, one after the other."""
    offsets, place = [], 0
    for part in parts:
        start = text.index(part, place)
        place = start + len(part)
        offsets.append((start, place))
    return offsets


def test_english_pieces_of_a_word_share_its_number() -> None:
    text = "Don't re-tokenize naïve_x, 1234!"
    parts = ("Don", "'", "t", "re", "-", "token", "ize", "naïve", "_x", ",", "12", "34", "!")
    numbers = word_numbers(text, [(0, 0), *pieces(text, *parts), (0, 0)])
    assert numbers == [-1, 0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9, -1]
    assert word_numbers(" a b", [(0, 2), (2, 4)]) == [0, 1]  # byte-level tokens carry the space before them
    assert word_numbers("a  b", [(0, 1), (1, 3), (3, 4)]) == [0, -1, 1]


def test_chinese_words_by_jieba() -> None:
    pytest.importorskip("jieba")
    text = "我爱自然语言处理，GPT很好。"
    numbers = word_numbers(
        text, [*((i, i + 1) for i in range(9)), (9, 11), (11, 12), *((i, i + 1) for i in (12, 13, 14))]
    )
    assert numbers[:9] == [0, 1, 2, 2, 2, 2, 3, 3, 4]  # 我 爱 自然语言 处理 ，
    assert numbers[9] == numbers[10] == 5  # GP T
    assert numbers[13] != numbers[12]


def test_bytes_of_a_character_and_tokens_over_several_words() -> None:
    def segment(run: str) -> list[str]:
        return [run[i : i + 2] for i in range(0, len(run), 2)]

    # 你 as three byte tokens, 好
    assert word_numbers("你好世界", [(0, 1), (0, 1), (0, 1), (1, 2), (2, 3), (3, 4)], segment) == [0, 0, 0, 0, 1, 1]
    # 好世 joins 你好 and 世界
    assert word_numbers("你好世界啊", [(0, 1), (1, 3), (3, 4), (4, 5)], segment) == [0, 0, 0, 1]
    assert word_numbers("𠮷野家", [(0, 1), (1, 2), (2, 3)], segment) == [0, 0, 1]  # beyond the basic plane
    assert word_numbers("", [(0, 0)]) == [-1]


def test_without_jieba_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "jieba":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "jieba", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert word_numbers("plain English", [(0, 5), (6, 13)]) == [0, 1]
    with pytest.raises(MissingDependencyError, match="pip install jieba"):
        word_numbers("你好", [(0, 1), (1, 2)])


def test_words_of_a_real_tokenizer_reach_the_mask() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "你", "好"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    text = "playing 你好"
    encoding = tokenizer.encode(text)
    numbers = word_numbers(text, encoding.offsets, lambda run: [run])
    assert encoding.tokens == ["play", "##ing", "你", "好"] and numbers == [0, 0, 1, 1]
    ids = torch.tensor([encoding.ids])
    for seed in range(8):
        settings = {"special_ids": [0, 1, 2], "mask_id": 3, "vocab_size": 8, "word_ids": torch.tensor([numbers])}
        labels = mask_tokens(ids, generator=generator(seed), **settings)[1][0]
        assert (labels != IGNORED).tolist() in ([True, True, False, False], [False, False, True, True])


# -------------------------------------------------------------------------------------------------------------- losses
def test_two_hidden_words_cost_what_the_formula_says() -> None:
    """-(ln 0.1 + ln 0.2) = 3.912."""
    probabilities = torch.tensor([[0.1, 0.9, 0.0], [0.3, 0.2, 0.5], [0.0, 0.0, 1.0]]).clamp(min=1e-9)
    labels = torch.tensor([0, 1, IGNORED])
    assert masked_loss(probabilities.log(), labels, reduction="sum").item() == pytest.approx(3.912, abs=1e-3)
    assert masked_loss(probabilities.log(), labels).item() == pytest.approx(1.956, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_against_float64(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 7, 50, generator=generator(4)) * 8).to(dtype)
    labels = torch.randint(50, (3, 7), generator=generator(5))
    labels[:, ::2] = IGNORED
    expected, count = 0.0, 0
    for row, label in zip(logits.double().flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        if label != IGNORED:
            expected += math.log(sum(math.exp(value - row[label]) for value in row))
            count += 1
    assert masked_loss(logits, labels, reduction="sum").item() == pytest.approx(expected, rel=1e-6)
    assert masked_loss(logits, labels).item() == pytest.approx(expected / count, rel=1e-6)


def test_nothing_asked_costs_nothing() -> None:
    logits = torch.randn(2, 4, 9, requires_grad=True)
    loss = masked_loss(logits, torch.full((2, 4), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    assert masked_loss(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)).item() == 0


def test_next_sentence_is_a_judgement_on_the_pair() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert next_sentence_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)
    assert next_sentence_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(expected + 1.5)
