"""The LSTM baseline: causal, the same in pieces, and equal to the equations of the LSTM."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bimo.models.config import LSTMConfig
from bimo.models.initial import init_weights
from bimo.models.recurrent import LSTMLanguageModel

CONFIG = LSTMConfig(vocab_size=30, hidden_size=16, num_layers=2)


def make(config: LSTMConfig = CONFIG) -> LSTMLanguageModel:
    model = LSTMLanguageModel(config)
    init_weights(model, 1)
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(30, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tied", [True, False])
def test_the_call_shape_is_the_decoders(tied: bool) -> None:
    model = make(dataclasses.replace(CONFIG, tied_embeddings=tied))
    hidden = model(random_ids(3, 7))
    assert hidden.shape == (3, 7, 16)
    assert model.logits(hidden).shape == (3, 7, 30)
    assert model.logits(hidden[0, -1]).shape == (30,)
    assert ("lm_head.weight" in model.state_dict()) is not tied


def test_the_future_is_not_seen() -> None:
    model, ids = make(), random_ids(2, 12)
    changed = ids.clone()
    changed[:, 8:] = 29 - changed[:, 8:]
    assert torch.equal(model(changed)[:, :8], model(ids)[:, :8])
    assert not torch.allclose(model(changed)[:, 8:], model(ids)[:, 8:], atol=1e-4)


def test_pieces_with_the_state_are_the_whole() -> None:
    model, ids = make(), random_ids(2, 11)
    parts, state = [], None
    for piece in ids.split([4, 1, 1, 5], dim=1):
        hidden, state = model.advance(piece, state)
        parts.append(hidden)
    assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-6)


def test_it_is_the_lstm_of_the_books() -> None:
    """i, f, o = σ(...), g = tanh(...), c = f c + i g, h = o tanh(c), one token and one row at a time."""
    model, ids = make(dataclasses.replace(CONFIG, num_layers=1)), random_ids(1, 6)
    weights = dict(model.lstm.named_parameters())
    h, c = torch.zeros(16), torch.zeros(16)
    for place, x in enumerate(model.embed_tokens(ids[0])):
        gates = (
            weights["weight_ih_l0"] @ x + weights["bias_ih_l0"] + weights["weight_hh_l0"] @ h + weights["bias_hh_l0"]
        )
        i, f, g, o = gates.split(16)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        assert torch.allclose(model(ids)[0, place], h, atol=1e-6)


def test_dropout_is_for_training() -> None:
    model, ids = make(dataclasses.replace(CONFIG, dropout=0.5)), random_ids(2, 9)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids), atol=1e-3)


def test_first_weights_depend_on_the_seed_alone() -> None:
    one, two = LSTMLanguageModel(CONFIG), LSTMLanguageModel(CONFIG)
    init_weights(one, 5)
    init_weights(two, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    init_weights(two, 6)
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.lstm.weight_hh_l1.abs().max() <= 16**-0.5


def test_it_learns_what_only_memory_can_tell() -> None:
    """The last token repeats the first, five tokens earlier."""
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        ids = torch.randint(6, (64, 6), generator=generator)
        ids[:, 5] = ids[:, 0]
        loss = F.cross_entropy(model.logits(model(ids[:, :-1])[:, -1]), ids[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # ln 6 = 1.8 without memory
