"""The encoder-decoder as a model: what padding, order, caches and settings do; parity is in tests/parity/."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.errors import UsageError
from bimo.models.attention import causal_mask
from bimo.models.config import SEQ2SEQ_FAMILIES
from bimo.models.empty import empty_model
from bimo.models.initial import init_weights
from bimo.models.seq2seq import EncoderDecoder, Seq2SeqConfig

FAMILIES = tuple(SEQ2SEQ_FAMILIES)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_positions": 40,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def make(family: str, **change: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(Seq2SeqConfig.of_family(family, **SIZES | change)).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_the_source_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model, source, target = make(family).to(dtype), random_ids(2, 20), random_ids(2, 7)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 9:] = 0
    said = model(source, target, mask)
    assert said.dtype == dtype
    alone = model(source[1:, :9], target[1:])
    assert (said[1:] - alone).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)
    other = source.clone()
    other[1, 9:] = 49 - other[1, 9:]
    assert torch.equal(model(other, target, mask.bool()), said)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_sees_the_past_and_all_of_the_source(family: str) -> None:
    model, source, target = make(family), random_ids(1, 12), random_ids(1, 9)
    hidden = model(source, target)
    changed = target.clone()
    changed[:, 5:] = 51 - changed[:, 5:]
    assert torch.equal(model(source, changed)[:, :5], hidden[:, :5])
    assert (model(source, changed)[:, 5:] - hidden[:, 5:]).abs().max() > 1e-3
    for place in (0, 11):
        other = source.clone()
        other[0, place] = 51 - other[0, place]
        assert (model(other, target)[:, 0] - hidden[:, 0]).abs().max() > 1e-4  # the first token already
    assert (model.encode(source.flip(1)).flip(1) - model.encode(source)).abs().max() > 1e-3  # order counts
    assert (model(source, target.flip(1)).flip(1) - hidden).abs().max() > 1e-3


class OneRow:
    """What an engine does: tokens of many sequences in one row, keys kept a layer and a sequence at a time."""

    def __init__(
        self, model: EncoderDecoder, sequences: list[int], positions: list[int], cache: dict[Any, Any]
    ) -> None:
        self.bias, self.sequences, self.positions, self.cache = model.decoder_bias, sequences, positions, cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        outs = []
        for row, (sequence, position) in enumerate(zip(self.sequences, self.positions, strict=True)):
            kept = self.cache.setdefault((layer, sequence), ([], []))
            kept[0].append(k[0, row])
            kept[1].append(v[0, row])
            keys, values = torch.stack(kept[0]), torch.stack(kept[1])  # (length, H, E)
            scores = torch.einsum("he,she->hs", q[0, row], keys) * scale
            if self.bias is not None:
                scores = scores + self.bias(torch.tensor([position]), torch.arange(len(keys)))[:, 0]
            outs.append(torch.einsum("hs,she->he", scores.softmax(-1), values))
        return torch.stack(outs)[None]


class KeptSources:
    """Cross-attention over keys and values made once a source."""

    def __init__(self, sequences: list[int], kept: list[list[tuple[Tensor, Tensor]]]) -> None:
        self.sequences, self.kept = sequences, kept

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        assert k.shape[1] == v.shape[1] == 0  # nothing new: memory was not given
        outs = []
        for row, sequence in enumerate(self.sequences):
            keys, values = self.kept[sequence][layer]
            weights = (torch.einsum("he,she->hs", q[0, row], keys[0]) * scale).softmax(-1)
            outs.append(torch.einsum("hs,she->he", weights, values[0]))
        return torch.stack(outs)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_many_sequences_in_one_row_are_each_alone(family: str) -> None:
    """Two targets of unequal length and different sources, decoded token by token in one row, with caches."""
    model = make(family)
    sources, targets = [random_ids(1, 15), random_ids(1, 6)], [random_ids(1, 8), random_ids(2, 11)[1:]]
    with torch.inference_mode():
        kept = [model.cross_keys_values(model.encode(source)) for source in sources]
        assert len(kept[0]) == 3 and kept[0][0][0].shape == (1, 15, 4, 8)
        cache: dict[Any, Any] = {}
        steps: list[list[Tensor]] = [[], []]
        for place in range(11):
            alive = [i for i, target in enumerate(targets) if place < target.shape[1]]
            ids = torch.stack([targets[i][0, place] for i in alive])[None]
            positions = [place] * len(alive)
            attend = OneRow(model, alive, positions, cache)
            hidden = model.decode(ids, None, None, torch.tensor([positions]), attend, KeptSources(alive, kept))
            for row, i in enumerate(alive):
                steps[i].append(hidden[0, row])
        for source, target, said in zip(sources, targets, steps, strict=True):
            assert (torch.stack(said) - model(source, target)[0]).abs().max() < 1e-5


def test_dropout_is_for_training_and_each_setting_acts() -> None:
    source, target = random_ids(2, 12), random_ids(2, 9)
    settings = ("dropout", "attention_dropout", "activation_dropout")
    for family in FAMILIES:
        for name in settings:
            model = make(family, **dict.fromkeys(settings, 0.0) | {name: 0.5})
            calm = model(source, target)
            assert torch.equal(model(source, target), calm)
            model.train()
            assert not torch.allclose(model(source, target), calm, atol=1e-3), (family, name)
        still = make(family, **dict.fromkeys(settings, 0.0)).train()
        assert torch.equal(still(source, target), still(source, target))


def test_mistakes_are_named() -> None:
    model, ids = make("marian"), random_ids(1, 40)
    memory = model.encode(ids)
    with pytest.raises(UsageError, match=r"the source has 41 tokens, this model takes at most 40"):
        model.encode(random_ids(1, 41))
    with pytest.raises(UsageError, match=r"the target has 41 tokens"):
        model.decode(random_ids(1, 41), memory)
    with pytest.raises(UsageError, match=r"source_mask has the shape \(1, 5\)"):
        model.encode(ids, torch.ones(1, 5))
    with pytest.raises(UsageError, match="decode needs `memory`"):
        model.decode(ids, None)
    assert make("t5").encode(random_ids(1, 60)).shape == (1, 60, 32)  # distances have no end


def test_rows_of_padding_alone_are_finite() -> None:
    for family in FAMILIES:
        model, source, target = make(family), random_ids(2, 8), random_ids(2, 4)
        mask = torch.ones_like(source)
        mask[1] = 0
        model.logits(model(source, target, mask)).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 33}, "sinusoidal positions need an even hidden_size"),
        ({"pad_token_id": 50}, "pad_token_id 50 is not one of the 50 tokens"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id -1"),
        ({"position": "relative", "relative_buckets": 3}, "even number from 4 on, not 3"),
        ({"position": "relative", "relative_max_distance": 16}, "relative_max_distance 16 must be more than half"),
    ],
)
def test_impossible_configs(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(make("marian").config, **change)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_one_has_the_same_names_and_no_memory(family: str) -> None:
    config = make(family, tied_embeddings=False, gated_mlp=True).config
    shapes = {name: parameter.shape for name, parameter in EncoderDecoder(config).named_parameters()}
    empty = empty_model(config)
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert sum(shape.numel() for shape in shapes.values()) == config.num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights_are_the_papers_and_repeatable(family: str) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 200}
    first, second, third = (make(family, **sizes) for _ in range(3))
    init_weights(first, 7)
    init_weights(second, 7)
    init_weights(third, 8)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(one, two), name
        if one.dim() == 2:
            assert not torch.equal(one, three), name
        else:
            assert torch.equal(one, torch.full_like(one, float(name.endswith("norm.weight")))), name
    attention, mlp = first.decoder.layers[0].attention.qkv_proj.weight, first.decoder.layers[0].mlp.down_proj.weight
    spreads = {
        "marian": (64**-0.5, (2 / 128) ** 0.5, (2 / 128) ** 0.5, (2 / 160) ** 0.5),
        "bart": (0.02, 0.02, 0.02, 0.02),
        "t5": (1.0, (64 * 16) ** -0.5, 64**-0.5, 96**-0.5),
    }
    got = (first.embed_tokens.weight, attention[:64], attention[64:], mlp)
    for tensor, spread in zip(got, spreads[family], strict=True):
        assert abs(tensor.std() / spread - 1) < 0.1
    said = first.logits(first(random_ids(4, 20), random_ids(4, 20)))
    loss = F.cross_entropy(said.flatten(0, 1), 199 - random_ids(4, 20).flatten())
    assert 5.0 < loss < 6.5  # ln 200 = 5.3: it begins without a strong opinion


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_what_only_the_source_tells(family: str) -> None:
    """A target's first word is the source's last: cross-attention has to find it by its place."""
    silent = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    model = make(family, num_encoder_layers=1, num_decoder_layers=1, **silent).train()
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    start, losses = torch.zeros(32, 1, dtype=torch.long), []
    for _ in range(80):
        source = torch.randint(2, 6, (32, 2), generator=generator)
        loss = F.cross_entropy(model.logits(model(source, start))[:, 0], source[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3, losses[-10:]  # ln 4 = 1.4 without the source, 0.8 without its order


def test_a_bias_makes_attention_causal_too() -> None:
    """The default of `decode`, against scores written out."""
    model, ids = make("t5", num_decoder_layers=1), random_ids(1, 6)
    bias = model.decoder_bias
    assert bias is not None
    positions = torch.arange(6)
    added = bias(positions, positions).masked_fill(~causal_mask(6, 6, None), -torch.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        weights = (torch.einsum("bthe,bshe->bhts", q, k) * scale + added).softmax(-1)
        return torch.einsum("bhts,bshe->bthe", weights, v)

    memory = model.encode(ids)
    assert torch.allclose(model.decode(ids, memory, attend=attend), model.decode(ids, memory), atol=1e-5)
