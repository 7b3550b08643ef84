"""Denoising: nothing is lost between source and target, shares are as asked, T5's own figures, the loss of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bimo.data.loader import IGNORED
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import UsageError
from bimo.models.config import Seq2SeqConfig
from bimo.models.initial import init_weights
from bimo.models.seq2seq import EncoderDecoder
from bimo.objectives.denoising import DenoisingLoader, infill, noise_spans, replace_spans
from bimo.objectives.seq2seq import seq2seq_loss, target_logits

SENTINELS = list(range(900, 1000))
MASK, END, START = 899, 1, 0


def restore(source: list[int], target: list[int]) -> list[int]:
    """The text that a source and its target were made of."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[SENTINELS[len(spans) - 1]].append(token)
    return [piece for token in source for piece in (spans[token] if token in SENTINELS else [token])]


@given(st.integers(0, 300), st.floats(0.01, 0.9), st.floats(1, 10), st.integers(0, 9))
def test_nothing_is_lost(length: int, share: float, mean_span: float, seed: int) -> None:
    tokens = np.arange(10, 10 + length)
    noise = noise_spans(length, share, mean_span, np.random.default_rng(seed), most=100)
    source, target = replace_spans(tokens, noise, SENTINELS)
    assert restore(source.tolist(), target.tolist()) == tokens.tolist()
    marks = [token for token in source.tolist() if token in SENTINELS]
    assert marks == SENTINELS[: len(marks)]
    if length >= 2:
        assert noise.sum() == min(max(round(length * share), 1), length - 1)
    ruined, whole = infill(tokens, noise, MASK)
    assert whole.tolist() == tokens.tolist() and ruined.tolist() == [MASK if t in SENTINELS else t for t in source]


def test_the_figures_of_t5() -> None:
    """512 tokens at 15 % in spans of 3: 77 tokens in 26 spans; source 512 - 77 + 26, target 77 + 26."""
    noise = noise_spans(512, 0.15, 3.0, np.random.default_rng(0))
    begins = noise & ~np.concatenate(([False], noise[:-1]))
    assert (noise.sum(), begins.sum()) == (77, 26)
    source, target = replace_spans(np.arange(512), noise, SENTINELS)
    assert (len(source), len(target)) == (461, 103)


def test_every_place_is_hidden_about_as_often() -> None:
    draws = np.random.default_rng(1)
    hidden = np.mean([noise_spans(40, 0.2, 2.0, draws) for _ in range(4000)], 0)
    assert abs(hidden.mean() - 0.2) < 1e-9
    assert hidden.min() > 0.1 and hidden.max() < 0.25  # a little rarer at both ends


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    random = np.random.default_rng(0)
    return write_tokens(
        tmp_path / "t", [(str(n), random.integers(10, 800, 60).tolist()) for n in range(20)], vocab_size=1000, mark=""
    )


def make(file: TokenFile, **settings: object) -> DenoisingLoader:
    shape = {"length": 32, "share": 0.15, "mean_span": 3.0, "end_id": END, "start_id": START, "sentinels": SENTINELS}
    return DenoisingLoader([file], **{**shape, **settings})  # type: ignore[arg-type]


def test_a_row_is_the_same_whoever_reads_it_and_another_in_the_next_epoch(file: TokenFile) -> None:
    loader = make(file, seed=5)
    first = loader.next_batch(6)
    again = make(file, seed=5).batch(first.origins)
    assert (first.source_ids == again.source_ids).all() and (first.targets == again.targets).all()
    later = loader.batch([origin._replace(epoch=1) for origin in first.origins])
    assert not np.array_equal(first.source_ids, later.source_ids)
    for row in range(6):
        source = first.source_ids[row][first.source_mask[row]].tolist()
        target = first.targets[row][first.targets[row] != IGNORED].tolist()
        assert source[-1] == target[-1] == END
        start, end = loader.span(file, first.origins[row].row)
        assert restore(source[:-1], target[:-1]) == file.tokens[start:end].tolist()


def test_infilling_asks_for_the_whole_text(file: TokenFile) -> None:
    batch = make(file, sentinels=(), mask_id=MASK).next_batch(4)
    assert (batch.targets != IGNORED).sum() == 4 * 32 and not batch.is_text
    assert (batch.source_ids == MASK).any()
    with pytest.raises(UsageError, match="sentinels or a mask"):
        make(file, sentinels=())


@torch.no_grad()
def test_the_loss_is_the_mean_over_targets_in_float64(file: TokenFile) -> None:
    """Against log-softmax in float64 of each row alone, without padding."""
    config = Seq2SeqConfig.of_family(
        "t5", vocab_size=1000, hidden_size=16, num_encoder_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
        intermediate_size=32, decoder_start_token_id=START, pad_token_id=START, eos_token_id=END, dropout=0.0,
    )  # fmt: skip
    model = EncoderDecoder(config).eval()
    init_weights(model, 0)
    batch = make(file).next_batch(5)
    loss = seq2seq_loss(model, batch)
    nats, hits = 0.0, 0
    for row in range(5):
        source = torch.from_numpy(batch.source_ids[row][batch.source_mask[row]])[None]
        wanted = torch.from_numpy(batch.targets[row][batch.targets[row] != IGNORED])
        read = torch.cat((torch.tensor([START]), wanted[:-1]))[None]
        scores = model.logits(model(source, read))[0].double().log_softmax(-1)
        nats -= float(scores.gather(1, wanted[:, None]).sum())
        hits += int((scores.argmax(-1) == wanted).sum())
    assert float(loss.total) == pytest.approx(nats, rel=1e-5)  # the loss is summed in float32
    assert loss.num_targets == batch.num_targets and loss.means["accuracy"] == (hits, batch.num_targets)
    smoothed = float(seq2seq_loss(model, batch, label_smoothing=0.1).total)
    logits, words = target_logits(model, batch)
    kept = words != IGNORED
    expected = 0.9 * nats - 0.1 * float(F.log_softmax(logits[kept].double(), -1).mean(-1).sum())
    assert smoothed == pytest.approx(expected, rel=1e-5)
    assert int(kept.sum()) == batch.num_targets and len(words) % 64 == 0
