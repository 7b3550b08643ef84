"""Unlikelihood: which words, what they cost in float64, and that a model repeats itself less; Chinese and English."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bimo.data.example_loader import ExampleBatch
from bimo.data.loader import Batch
from bimo.errors import UsageError
from bimo.evaluation.repetition import repetition
from bimo.models.config import DecoderConfig, EncoderConfig
from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.initial import init_weights
from bimo.models.packed import PackedRows
from bimo.models.recurrent import LSTMConfig, LSTMLanguageModel
from bimo.objectives.answers import answer_loss
from bimo.objectives.causal import causal_loss
from bimo.objectives.r_drop import with_r_drop
from bimo.objectives.unlikelihood import Candidates, ListedPhrases, linear_unlikelihood, read_phrases, with_penalty
from bimo.recipe import PenaltyRecipe
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import save_tokenizer, train_tokenizer
from tests.tokenizer.tiny import byte_level_metadata, load, sentencepiece_metadata

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_metadata(), tmp_path_factory.mktemp("bytes") / "t")


def packed(rows: list[list[tuple[list[int], list[int]]]], width: int, weights: Any = None) -> Batch:
    """Rows of examples, each a question and its answer, as the loader makes them."""
    shape = (len(rows), width)
    ids, positions, segments = (np.zeros(shape, np.int64) for _ in range(3))
    targets = np.full(shape, IGNORED, np.int64)
    for row, examples in enumerate(rows):
        start = 0
        for number, (question, answer) in enumerate(examples):
            text = question + answer
            stop = start + len(text) - 1
            ids[row, start:stop] = text[:-1]
            targets[row, stop - len(answer) : stop] = answer
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
            start = stop
        segments[row, start:] = len(examples)
    factors = np.ones(shape, np.float32) if weights is None else weights
    return ExampleBatch(ids, targets, positions, segments, (), factors)


def decoder(vocab_size: int = 60, **changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "family": "llama", "vocab_size": vocab_size, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
        "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 32, "max_positions": 64,
    }  # fmt: skip
    model = Decoder(DecoderConfig(**{**settings, **changes}))
    init_weights(model, 0)
    return model.train()


def pairs(candidates: Candidates, start: int, end: int) -> list[set[int]]:
    rows, tokens, _ = candidates.of(start, end)
    found: list[set[int]] = [set() for _ in range(min(end, len(candidates.words)) - start)]
    for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        assert token not in found[row]
        found[row].add(token)
    return found


# --- which words ----------------------------------------------------------------------------------------------------


def test_words_of_the_answer_so_far() -> None:
    """Not those of the question, of other answers, the right one, nor control tokens; each once."""
    batch = packed([[([1, 2], [10, 11, 10, 10, 12, 3]), ([4], [10, 13])], [([10, 11], [11, 3, 14])]], 12)
    candidates = Candidates(batch, 1.0, 0.0, None, special_ids={3})
    expected = [set(), {10}, {11}, {11}, {10, 11}, {10, 11, 12}, set(), {10}, set(), {11}, {11}]
    assert pairs(candidates, 0, 64) == expected
    for start in range(len(expected)):  # however it is cut
        assert pairs(candidates, start, start + 3) == expected[start : start + 3]
    assert candidates.of(64, 70)[0].numel() == 0


def test_two_answers_of_a_dialogue_are_two() -> None:
    batch = packed([[([1], [10, 11, 12, 13, 14])]], 6)
    batch.targets[0, 2] = IGNORED  # the second speaker's turn
    assert pairs(Candidates(batch, 1.0, 0.0, None), 0, 9) == [set(), {10}, set(), {13}]


PHRASES = ["make a bomb", "毒品", "Größe", "🧑‍🚀"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_phrases_begin_and_go_on(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        tokenizer = load(sentencepiece_metadata(), tmp_path / "t")
    listed = ListedPhrases(PHRASES, tokenizer)
    text = "He will make a bomb. Make a bomb: make a bomb，毒品和毒品 毒品。Größe 🧑‍🚀"
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    batch = packed([[(ids[:1], ids[1:])]], len(ids))
    found = pairs(Candidates(batch, 0.0, 1.0, listed), 0, len(ids))
    # each phrase, wherever it stands, would have been seen from its first token to its last, had it not been right
    expected, places = tokenizer.decode(ids).encode(), []
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in ids])
    base = int(ends[-1]) - len(expected)
    for phrase in {*PHRASES, "Make a bomb"}:
        start = expected.find(phrase.encode())
        while start >= 0:
            places.append((start + base, start + base + len(phrase.encode())))
            start = expected.find(phrase.encode(), start + 1)
    assert len(places) == 8
    for start, end in places:
        tokens = [place for place in range(1, len(ids)) if ends[place - 1] < end and ends[place] > start]
        for place in tokens:  # another word was right there
            so_far = packed([[(ids[:1], [*ids[1:place], 0])]], len(ids))
            would = pairs(Candidates(so_far, 0.0, 1.0, listed), 0, len(ids))
            assert ids[place] in would[-1], tokenizer.token_text(ids[place])
    for right, bad in zip(ids[1:], found, strict=True):
        assert right not in bad and set(listed.firsts) - {right} <= bad
    assert not tokenizer.special_ids & set(listed.firsts)


def test_both_spellings_of_english(tokenizer: Tokenizer) -> None:
    listed = ListedPhrases(["bomb"], tokenizer)
    spelled = {tokenizer.encode(text, add_special_tokens=False)[0] for text in ("bomb", " bomb", "Bomb", " Bomb")}
    assert set(listed.firsts) == spelled


def test_a_phrase_does_not_reach_over_documents(tokenizer: Tokenizer) -> None:
    listed = ListedPhrases(["毒品"], tokenizer)
    one, two = "毒", "品"
    ids = tokenizer.encode(one, add_special_tokens=False)
    other = tokenizer.encode(two, add_special_tokens=False)
    assert set(listed.nexts.get(tuple(ids), ())) == {other[0]}
    within = packed([[([1], [*ids, 0])]], 20)
    across = packed([[([1], [5, *ids, 0]), ([ids[-1]], [0])]], 20)
    across.input_ids[0, 2 + len(ids)] = ids[-1]
    assert other[0] in pairs(Candidates(within, 0.0, 1.0, listed), 0, 20)[-1]
    assert other[0] not in pairs(Candidates(across, 0.0, 1.0, listed), 0, 20)[-1]


def test_lists_are_read_and_bad_ones_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_bytes("\ufeffmake  a\tbomb\r\n\r\n 毒品 \n毒品\n".encode())
    assert read_phrases([str(good)]) == ["make a bomb", "毒品"]
    gbk, empty = tmp_path / "gbk.txt", tmp_path / "empty.txt"
    gbk.write_bytes("毒品\n".encode("gbk"))
    empty.write_text(" \n\n", encoding="utf-8")
    for file, said in ((gbk, "not UTF-8"), (empty, "is empty"), (tmp_path / "none.txt", "No such file")):
        with pytest.raises(UsageError, match=said) as caught:
            with_penalty(causal_loss, PenaltyRecipe(listed=1.0, words=(str(good), str(file))), tokenizer)
        assert file.name in str(caught.value)
    with pytest.raises(UsageError, match="control token"):
        ListedPhrases(["<|im_end|>"], tokenizer)


# --- what it costs --------------------------------------------------------------------------------------------------


def stated(hidden: Tensor, head: Tensor, found: list[tuple[int, int, float]]) -> Tensor:
    """-Σ w log(1 - p), as written."""
    p = (hidden @ head.t()).softmax(-1)
    return -sum((weight * (1 - p[row, token]).log() for row, token, weight in found), torch.zeros((), dtype=p.dtype))


@pytest.mark.parametrize("slices", [7, 64])
def test_as_stated(slices: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import bimo.objectives.unlikelihood as module

    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 16 * 420)
    monkeypatch.setattr(module, "SLOPES_AT_ONCE", slices * 420)
    draws = np.random.default_rng(0)
    rows = [[(draws.integers(5, 420, 4).tolist(), draws.integers(5, 30, 9).tolist()) for _ in range(3)]] * 2
    factors = draws.uniform(0.5, 2, (2, 40)).astype(np.float32)
    batch = packed(rows, 40, factors)
    listed = ListedPhrases(PHRASES, tokenizer)
    candidates = Candidates(batch, 0.7, 1.3, listed, tokenizer.special_ids)
    each = [tensor.tolist() for tensor in candidates.of(0, 54)]
    found = list(zip(*each, strict=True))
    assert {round(weight / factor, 4) for (row, _, weight) in found
            for factor in [float(factors[batch.targets != IGNORED][row])]} == {0.7, 1.3}  # fmt: skip
    hidden = torch.randn(64, 16, requires_grad=True)  # ten rows fill up
    weight = torch.randn(420, 16, requires_grad=True)
    ours = linear_unlikelihood(hidden, weight, candidates)
    gradients = torch.autograd.grad(ours * 3, [hidden, weight])
    exact = stated(hidden.double(), weight.double(), found)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact * 3, [hidden, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    frozen = linear_unlikelihood(hidden, weight.detach(), candidates)
    torch.testing.assert_close(torch.autograd.grad(frozen * 3, hidden)[0], gradients[0])


def test_a_word_that_is_certain_stays_finite() -> None:
    batch = packed([[([1], [10, 11])]], 4)
    candidates = Candidates(batch, 1.0, 0.0, None)
    weight = torch.zeros(60, 4)
    weight[10] = 100.0
    hidden = torch.ones(64, 4, requires_grad=True)
    loss = linear_unlikelihood(hidden, weight, candidates)
    assert float(loss.detach()) == pytest.approx(-np.log(1e-5), rel=1e-4)
    assert bool(torch.autograd.grad(loss, hidden)[0].isfinite().all())


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_added_to_a_loss(tied: bool, tokenizer: Tokenizer) -> None:
    model = decoder(420, tied_embeddings=tied)
    batch = packed([[([50, 51], [60, 61, 60, 62]), ([52], [63, 63])], [([53], [64, 65])]], 10)
    penalised = with_penalty(answer_loss, PenaltyRecipe(repetition=2.0), tokenizer)
    plain, found = answer_loss(model, batch), penalised(model, batch)
    learned = torch.from_numpy(batch.targets != IGNORED)
    ids, positions, segments = (torch.from_numpy(array) for array in (batch.input_ids, batch.positions, batch.segments))
    hidden = model(ids, positions, PackedRows(segments, torch.float32))[learned]
    head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.get_parameter("weight")
    # the second and fifth rows have nothing to repeat; of 63 63 the second is right
    wanted = [(1, 60, 2.0), (2, 61, 2.0), (3, 60, 2.0), (3, 61, 2.0), (7, 64, 2.0)]
    extra = stated(hidden.double(), head.double(), wanted)
    assert found.num_targets == plain.num_targets
    assert float((found.total - plain.total).detach()) == pytest.approx(float(extra.detach()), rel=1e-4)
    found.total.backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in model.parameters())


def test_in_bfloat16_it_is_nearly_the_same(tokenizer: Tokenizer) -> None:
    model = decoder(420)
    batch = packed([[([50, 51], [60, 61, 60, 62, 63, 64, 60])]], 10)
    penalised = with_penalty(answer_loss, PenaltyRecipe(repetition=2.0), tokenizer)
    exact = float(penalised(model, batch).total.detach())
    with torch.autocast("cpu", torch.bfloat16):
        rough = penalised(model, batch).total
    rough.backward()
    assert float(rough.detach()) == pytest.approx(exact, rel=0.01)


def test_not_while_it_is_evaluated_not_for_nothing_and_twice_with_r_drop(tokenizer: Tokenizer) -> None:
    model = decoder(420)
    batch = packed([[([50, 51], [60, 61, 60, 62])]], 8)
    assert with_penalty(answer_loss, PenaltyRecipe(), tokenizer) is answer_loss
    wish = PenaltyRecipe(repetition=1.0)
    penalised = with_penalty(answer_loss, wish, tokenizer)
    with_both = with_penalty(with_r_drop(causal_loss, 1.0), wish, tokenizer)  # no dropout: both passes are alike
    extra = penalised(model, batch).total - answer_loss(model, batch).total
    again = with_both(model, batch).total - with_r_drop(causal_loss, 1.0)(model, batch).total
    assert float(extra.detach()) == pytest.approx(float(again.detach()), rel=1e-3)
    model.eval()
    assert torch.equal(penalised(model, batch).total, answer_loss(model, batch).total)
    batch.targets[:] = IGNORED
    loss = penalised(model.train(), batch)
    loss.total.backward()
    assert loss.num_targets == 0 and float(loss.total.detach()) == 0


def test_a_recurrent_model_takes_it_and_an_encoder_does_not(tokenizer: Tokenizer) -> None:
    penalised = with_penalty(causal_loss, PenaltyRecipe(repetition=1.0), tokenizer)
    batch = packed([[([50, 51], [60, 61, 60, 62])]], 8)
    recurrent = LSTMLanguageModel(LSTMConfig(vocab_size=420, hidden_size=16, num_layers=1)).train()
    init_weights(recurrent, 0)
    assert float(penalised(recurrent, batch).total.detach()) > float(causal_loss(recurrent, batch).total.detach())
    shape = {"vocab_size": 60, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    with pytest.raises(UsageError, match="Encoder"):
        penalised(Encoder(EncoderConfig(**shape)).train(), batch)


# --- what it is for -------------------------------------------------------------------------------------------------


def continued(model: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What is likeliest after each."""
    ids = torch.tensor(prompts)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model.logits(model(ids))[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[:, len(prompts[0]) :].tolist()


EN = ["cat", "dog", "sun", "moon", "tree", "river", "stone", "bird", "fish", "horse", "cloud", "rain", "snow", "wind",
      "fire", "lake", "hill", "road", "ship", "bell"]  # fmt: skip
ZH = list("天地人山水火风云雨雪花草木石鸟鱼马牛羊日")


def walk(words: list[str], chance: random.Random) -> str:
    """Twelve of them, none twice; most have a favourite to follow them, in circles of three: who only knows what often
    follows what goes round and round."""
    path = [chance.choice(words)]
    while len(path) < 12:
        at = words.index(path[-1])
        left = [word for word in words if word not in path]
        favourite = words[at // 3 * 3 + (at + 1) % 3] if at < 18 else ""
        path.append(favourite if favourite in left and chance.random() < 0.9 else chance.choice(left))
    return " ".join(path)


def test_a_model_that_was_told_repeats_itself_less(tmp_path: Path) -> None:
    """And says what is listed less, without knowing the right words worse."""
    chance = random.Random(0)
    lines = [walk(words, chance) for words in (EN, ZH) for _ in range(300)]
    save_tokenizer(train_tokenizer(lines, vocab_size=400), tmp_path / "t")
    tokenizer = Tokenizer.from_directory(tmp_path / "t")
    texts = [[tokenizer.eos_token_ids[0], *tokenizer.encode(line, add_special_tokens=False)] for line in lines]
    held = packed([[(ids[:1], ids[1:])] for ids in texts[::20]], 16)
    words = tmp_path / "words.txt"
    words.write_text("fire\n马\n", encoding="utf-8")
    firsts = ListedPhrases(["fire", "马"], tokenizer).firsts
    not_right = torch.from_numpy(held.targets[..., None] != np.array(firsts))
    told = PenaltyRecipe(repetition=1.0, listed=3.0, words=(str(words),))
    repeated, listed, nats = [], [], []
    for penalty in (PenaltyRecipe(), told):
        model = decoder(tokenizer.vocab_size, hidden_size=32, head_dim=16)
        loss = with_penalty(answer_loss, penalty, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        chance = random.Random(0)
        for _ in range(220):
            batch = packed([[(ids[:1], ids[1:])] for ids in chance.sample(texts, 16)], 16)
            optimizer.zero_grad()
            (loss(model, batch).total / batch.num_targets).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            nats.append(float(answer_loss(model, held).total) / held.num_targets)
            p = model.logits(model(torch.from_numpy(held.input_ids))).softmax(-1)[..., firsts]
        listed.append(float((p * not_right).mean()))
        begun = [ids[:3] for language in (texts[:300], texts[300:]) for ids in language[:64]]
        written = [tokenizer.decode(ids + more) for ids, more in zip(begun, continued(model, begun, 8), strict=True)]
        repeated.append((repetition(written[:64], 1), repetition(written[64:], 1)))
    assert sum(repeated[1]) < 0.75 * sum(repeated[0])
    assert listed[1] < 0.6 * listed[0]
    assert nats[1] < nats[0] + 0.1
