"""The encoder as a model: what padding, segments and heads do to its numbers; parity is in tests/parity/."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bimo.errors import UsageError
from bimo.models.config import EncoderConfig
from bimo.models.empty import empty_model
from bimo.models.encoder import Encoder
from bimo.models.initial import init_weights
from bimo.objectives.masked import IGNORED, mask_tokens, masked_loss

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_positions=24,
    masked_head=True,
    next_sentence_head=True,
    labels=("好", "坏", "neutral"),
)


def make(config: EncoderConfig = CONFIG) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(dtype: torch.dtype) -> None:
    """A text beside longer ones says what it says alone, whatever stands in the padding."""
    model = make().to(dtype)
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 9:] = 0
    beside, alone = model(ids, mask)[1:, :9], model(ids[1:, :9])
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert (beside - alone).abs().max() < close
    other = ids.clone()
    other[1, 9:] = 49 - other[1, 9:]
    assert torch.equal(model(other, mask)[1, :9], model(ids, mask)[1, :9])
    assert torch.equal(model(ids, mask.bool()), model(ids, mask))
    for vector, own in ((model.embedding(beside), model.embedding(alone)), (model.pooled(beside), model.pooled(alone))):
        assert (vector - own).abs().max() < close


def test_it_looks_both_ways_and_at_segments_and_order() -> None:
    model, ids = make(), random_ids(1, 12)
    hidden = model(ids)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 50
    assert (model(changed)[0, 0] - hidden[0, 0]).abs().max() > 1e-3  # the first token sees the last
    segments = torch.zeros_like(ids)
    assert torch.equal(model(ids, None, segments), hidden)
    segments[0, 6:] = 1
    assert (model(ids, None, segments) - hidden).abs().max() > 1e-2
    assert (model(ids.flip(1)).flip(1) - hidden).abs().max() > 1e-2


def test_rows_of_padding_alone_are_finite() -> None:
    model, ids = make(), random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1] = 0
    hidden = model(ids, mask)
    assert hidden.isfinite().all()
    assert torch.equal(model.embedding(hidden, mask)[1], torch.zeros(32))
    model.masked_logits(hidden).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_heads_have_their_shapes_and_embeddings_their_length() -> None:
    model = make()
    ids = random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    hidden = model(ids, mask)
    assert hidden.shape == (3, 10, 32)
    assert model.masked_logits(hidden).shape == (3, 10, 50)
    assert model.next_sentence_logits(hidden).shape == (3, 2)
    assert model.class_logits(hidden).shape == (3, 3)
    vectors = model.embedding(hidden, mask)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3))
    mean = hidden[2, :4].mean(0)
    assert torch.allclose(vectors[2], mean / mean.norm(), atol=1e-6)
    picked = hidden[[0, 2], [5, 3]]  # only what is asked costs the product with the vocabulary
    assert torch.allclose(model.masked_logits(picked), model.masked_logits(hidden)[[0, 2], [5, 3]], atol=1e-5)


def test_dropout_is_for_training_and_each_setting_acts() -> None:
    ids = random_ids(2, 12)
    settings = ("dropout", "attention_dropout", "classifier_dropout")
    for name in settings:
        model = make(dataclasses.replace(CONFIG, **{**dict.fromkeys(settings, 0.0), name: 0.5}))
        calm = model.class_logits(model(ids))
        assert torch.equal(model.class_logits(model(ids)), calm)
        model.train()
        assert not torch.allclose(model.class_logits(model(ids)), calm, atol=1e-3), name
    still = make(dataclasses.replace(CONFIG, **dict.fromkeys(settings, 0.0))).train()
    assert torch.equal(still(ids), still(ids))


def test_mistakes_are_named() -> None:
    model = make(dataclasses.replace(CONFIG, masked_head=False, next_sentence_head=False, labels=()))
    ids = random_ids(1, 24)
    hidden = model(ids)
    with pytest.raises(UsageError, match=r"has 25 tokens, this encoder reads at most 24"):
        model(random_ids(1, 25))
    with pytest.raises(UsageError, match=r"attention_mask has the shape \(1, 5\)"):
        model(ids, torch.ones(1, 5))
    with pytest.raises(UsageError, match="token_type_ids has the shape"):
        model(ids, None, torch.zeros(24))
    with pytest.raises(UsageError, match="masked_head=True"):
        model.masked_logits(hidden)
    with pytest.raises(UsageError, match="next_sentence_head=True"):
        model.next_sentence_logits(hidden)
    with pytest.raises(UsageError, match="labels="):
        model.class_logits(hidden)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_heads": 5}, "must be a multiple of num_heads 5"),
        ({"pad_token_id": 50}, "pad_token_id 50 is not one of the 50 tokens"),
        ({"pooler": False}, "set pooler=True"),
    ],
)
def test_impossible_configs(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_an_empty_one_has_the_same_names_and_no_memory() -> None:
    shapes = {name: parameter.shape for name, parameter in make().named_parameters()}
    empty = dict(empty_model(CONFIG).named_parameters())
    assert {name: parameter.shape for name, parameter in empty.items()} == shapes
    assert all(parameter.is_meta for parameter in empty.values())


def test_first_weights_are_berts_and_repeatable() -> None:
    first, second, third = make(), make(), make()
    init_weights(first, 7)
    init_weights(second, 7)
    init_weights(third, 8)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(one, two), name
        if one.dim() == 2:
            assert not torch.equal(one, three) and abs(one.std() - 0.02) < 0.006, name
        else:
            assert torch.equal(one, torch.full_like(one, float(name.endswith("norm.weight")))), name


def test_it_learns_hidden_words_from_their_neighbours() -> None:
    """A row repeats one word: whatever is hidden, what stands around it tells."""
    model = Encoder(dataclasses.replace(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0, labels=()))
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(80):
        ids = torch.randint(2, 50, (32, 1), generator=generator).expand(32, 8)
        masked, labels = mask_tokens(ids, special_ids=[0], mask_id=1, vocab_size=50, generator=generator)
        chosen = labels != IGNORED
        loss = masked_loss(model.masked_logits(model(masked)[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 3.7 < losses[0] < 4.1  # ln 50 = 3.9: it begins without an opinion
    assert sum(losses[-10:]) / 10 < 1.5
