"""Several LoRA adapters in one batch: each sequence's answer is what its adapter, merged into the base, would give.

The references: the plain decoder in float32 with W + B A in its matrices, and for the kernels the same with the base's
weights as they hold them, so that what is left is the rounding of activations, of A (8 bits) and of B (bfloat16).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from bimo.engine.adapted import attach_changes
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.fused import FusedDecoder
from bimo.engine.fusing import fuse_weights, pack_change
from bimo.engine.kernels import load_kernels
from bimo.engine.low_rank import Change, check_change, joined, matrix_shapes
from bimo.engine.packing import pack_linear_layers
from bimo.engine.request import Request, SamplingParams
from bimo.engine.runner import ModelRunner
from bimo.errors import UsageError
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.quant.weights import QuantisedWeight, round_weight
from bimo.tokenizer.load import Tokenizer
from tests.engine.conftest import play, run
from tests.engine.test_fused import MODELS, NUM_BLOCKS, blocks_of, expected_hidden, ids_of, random_decoder, relative

kernels = load_kernels()
needs_kernels = pytest.mark.skipif(kernels is None, reason="the C++ kernels are not built")
SETS = kernels.instruction_sets() if kernels is not None else []
KINDS = ["llama", "rows", "rows, odd inner", "gpt2", "qwen2", "one key head"]


def random_change(
    config: DecoderConfig, seed: int, rank: int = 4, only: tuple[str, ...] = (), size: float = 0.5
) -> Change:
    """An adapter on all matrices, or on those whose name ends so; each of q, k, v, gate and up has its own A."""
    values = np.random.default_rng(seed)
    change: Change = {}
    for name, (rows, columns) in matrix_shapes(config).items():
        if only and not name.endswith(only):
            continue
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        ends = [rows]
        if name.endswith("qkv_proj"):
            ends = [heads, heads + kv, rows]
        elif name.endswith("gate_up_proj"):
            ends = [rows // 2, rows]
        starts = [0, *ends[:-1]]
        change[name] = [
            (
                start,
                end,
                values.normal(0, columns**-0.5, (rank, columns)).astype(np.float32),
                values.normal(0, size * rank**-0.5, (end - start, rank)).astype(np.float32),
            )
            for start, end in zip(starts, ends, strict=True)
        ]
    return change


def merged(decoder: Decoder, change: Change) -> Decoder:
    """The plain model with W + B A, summed in float64."""
    model = copy.deepcopy(decoder)
    for name, shape in matrix_shapes(model.config).items():
        if name in change:
            down, up = joined(change[name], shape)
            weight = model.get_parameter(f"{name}.weight")
            weight.data = (weight.double() + torch.from_numpy(up).double() @ torch.from_numpy(down).double()).float()
    return model


def fused_with(
    settings: dict[str, Any], changes: dict[str, Change], quant: str = "int8", *, tiny: str = "", **more: Any
) -> tuple[FusedDecoder, Decoder]:
    """A fused model with adapters, and the plain base of the same rounded weights; those of the first layer's matrix
    `tiny` are near nothing."""
    decoder = random_decoder(settings)
    if tiny:
        decoder.get_parameter(f"layers.0.{tiny}.weight").data *= 1e-3
    rounded = {
        name: round_weight(name, weight.detach(), quant, tied=decoder.config.tied_embeddings)
        for name, weight in decoder.named_parameters()
    }
    weights = fuse_weights(decoder.config, rounded.items(), quant)
    packed = {name: pack_change(decoder.config, change, weights) for name, change in changes.items()}
    fused = FusedDecoder(decoder.config, weights, adapters=packed, **more)
    fused.make_cache(NUM_BLOCKS, 16)
    plain = {name: w.dequantise() if isinstance(w, QuantisedWeight) else w for name, w in rounded.items()}
    decoder.load_state_dict(plain, strict=False)
    return fused, decoder


def hidden_of(fused: FusedDecoder, ids: list[int], spans: list[Any], adapters: list[int]) -> torch.Tensor:
    return torch.from_numpy(fused.fused.step(ids, spans, [], adapters=adapters)[0])


@needs_kernels
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("name", KINDS)
def test_the_kernels_compute_each_row_with_its_own_adapter(name: str, quant: str) -> None:
    config = DecoderConfig(**MODELS[name])
    changes = {"one": random_change(config, 1), "other": random_change(config, 2, rank=21, only=("qkv_proj", "_proj"))}
    fused, decoder = fused_with(MODELS[name], changes, quant)
    ids = [ids_of(seed, 60) for seed in range(3)]
    spans = [(0, 60, blocks_of(n)) for n in range(3)]
    hidden = hidden_of(fused, [token for row in ids for token in row], spans, [1, 0, 2]).split(60)
    for row, change, found in zip(ids, (changes["one"], {}, changes["other"]), hidden, strict=True):
        expected = expected_hidden(merged(decoder, change), row)
        assert relative(found, expected) < 0.05
        if change:  # it is no small change that would go unnoticed
            assert relative(expected_hidden(decoder, row), expected) > 0.3


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", ["llama", "rows, odd inner"])
@pytest.mark.parametrize("matrix", ["attention.qkv_proj", "attention.out_proj", "mlp.gate_up_proj", "mlp.down_proj"])
def test_what_an_adapter_adds_to_each_matrix(matrix: str, name: str, instruction_set: str) -> None:
    """One layer, one matrix, whose own weights are near nothing: what it gives is the adapter's. It is off by as much
    as a base's product is, whose activations have 8 bits as well."""
    settings = MODELS[name] | {"num_layers": 1}
    change = random_change(DecoderConfig(**settings), 3, rank=7, only=(matrix,))
    fused, decoder = fused_with(settings, {"one": change}, tiny=matrix, instruction_set=instruction_set)
    assert fused.fused.instruction_set == instruction_set
    ids, spans = ids_of(3, 20), [(0, 20, blocks_of(0))]
    added = hidden_of(fused, ids, spans, [1]) - hidden_of(fused, ids, spans, [0])
    exact = expected_hidden(merged(decoder, change), ids) - expected_hidden(decoder, ids)
    assert relative(added, exact) < 0.03


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
def test_a_row_s_result_does_not_depend_on_chunks_or_company(instruction_set: str) -> None:
    """Bit for bit, with adapters too; and a row without one is what it was before any was loaded."""
    config = DecoderConfig(**MODELS["rows"])
    changes = {"one": random_change(config, 1), "other": random_change(config, 2, rank=9, only=("out_proj",))}
    fused, _ = fused_with(MODELS["rows"], changes, instruction_set=instruction_set)
    bare, _ = fused_with(MODELS["rows"], {}, instruction_set=instruction_set)
    ids = [ids_of(seed, 90) for seed in range(3)]
    whole = [
        hidden_of(fused, row, [(0, 90, blocks_of(n))], [adapter])
        for n, (row, adapter) in enumerate(zip(ids, (1, 2, 0), strict=True))
    ]
    assert torch.equal(whole[2], hidden_of(bare, ids[2], [(0, 90, blocks_of(2))], []))
    assert not torch.equal(whole[0], hidden_of(bare, ids[0], [(0, 90, blocks_of(0))], []))
    fused.make_cache(NUM_BLOCKS, 16)
    starts = [0, 0, 0]
    for sizes in [(33, 7, 1), (1, 1, 1), (2, 3, 70), (1, 4, 1), (40, 1, 9), (1, 5, 1), (3, 1, 1)]:
        spans = [(starts[n], count, blocks_of(n)) for n, count in enumerate(sizes)]
        tokens = [token for n, count in enumerate(sizes) for token in ids[n][starts[n] :][:count]]
        parts = hidden_of(fused, tokens, spans, [1, 2, 0]).split(list(sizes))
        for n, (count, found) in enumerate(zip(sizes, parts, strict=True)):
            assert torch.equal(found, whole[n][starts[n] : starts[n] + count]), (n, starts[n])
            starts[n] += count


@needs_kernels
@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_computes_the_same(threads: int) -> None:
    config = DecoderConfig(**MODELS["qwen2"])
    fused, _ = fused_with(MODELS["qwen2"], {"one": random_change(config, 1), "other": random_change(config, 2)})
    tokens, spans = ids_of(7, 90), [(0, 30, blocks_of(n)) for n in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = hidden_of(fused, tokens, spans, [2, 0, 1])
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(hidden_of(fused, tokens, spans, [2, 0, 1]), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_what_would_read_outside_is_refused() -> None:
    config = DecoderConfig(**MODELS["llama"])
    fused, _ = fused_with(MODELS["llama"], {"one": random_change(config, 1)})
    for adapters, words in [([2], "not there"), ([-1], "not there"), ([1, 1], "differ in number")]:
        with pytest.raises(ValueError, match=words):
            hidden_of(fused, [1], [(0, 1, [0])], adapters)
    weights = fuse_weights(
        config, ((n, p.detach()) for n, p in random_decoder(MODELS["llama"]).named_parameters()), "int8"
    )
    parts = pack_change(config, random_change(config, 1), weights)
    other = pack_change(config, random_change(config, 1, rank=40), weights)
    wrong = parts[0, "qkv"], parts[0, "down"], other[0, "qkv"]
    for place, change, words in [
        ((3, "qkv"), wrong[0], "layer that is not there"),
        ((0, "out"), wrong[1], "another width"),
        ((0, "down"), wrong[0], "another width"),
        ((0, "out"), wrong[0], "other rows|another width"),
        ((0, "qkv"), type(wrong[0])(wrong[0].down, wrong[2].first, wrong[2].count, wrong[2].up), "more columns"),
        ((0, "qkv"), type(wrong[0])(wrong[0].down, wrong[0].first, wrong[0].count, wrong[2].up), "another size"),
    ]:
        with pytest.raises(ValueError, match=words):
            fused.fused.add_adapter({place: change})


def test_an_adapter_that_does_not_fit_is_refused_by_name() -> None:
    config = DecoderConfig(**MODELS["llama"])
    good = random_change(config, 1)
    check_change("客服", good, config)
    wide = random_change(DecoderConfig(**MODELS["llama"] | {"hidden_size": 128}), 1)
    deep = random_change(DecoderConfig(**MODELS["llama"] | {"num_layers": 5}), 1)
    large = random_change(config, 1, rank=300)
    broken = random_change(config, 1)
    broken["layers.1.mlp.down_proj"][0][2][0, 0] = np.nan
    head = good | {"lm_head": good["layers.0.attention.out_proj"]}
    for change, words in [
        (wide, "for another base"),
        (deep, "another base"),
        (large, "rank 300 .* 256 at most"),
        (broken, "layers.1.mlp.down_proj"),
        (head, "lm_head"),
    ]:
        with pytest.raises(UsageError, match=words) as refused:
            check_change("客服", change, config)
        assert "'客服'" in str(refused.value) and refused.value.param == "adapters"


# --- the engine, by plain torch and by the kernels --------------------------------------------------------------------

PROMPTS = [
    "从前有一只狐狸，它住在山里。",
    "Once upon a time there was a fox.",
    "狐狸 fox 🦊 狐狸 fox 🦊 狐狸 fox",
    "The sea",
]
ADAPTERS = [None, "support", "zh", "support", "zh", None, None, "zh"]  # no prompt twice with the same


def make_engine(model: Any, tokenizer: Tokenizer, **limits: Any) -> Engine:
    runner = ModelRunner(model, num_blocks=64, block_size=16)
    return Engine(runner, tokenizer, EngineConfig(context_length=256, **limits))


def ask(tokenizer: Tokenizer, text: str, adapter: str | None, max_tokens: int = 24, **settings: Any) -> Request:
    settings = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens} | settings
    return Request(prompt_token_ids=tokenizer.encode(text), sampling=SamplingParams(**settings), adapter=adapter)


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Tokenizer) -> Decoder:
    settings = MODELS["rows"] | {"vocab_size": tiny_tokenizer.vocab_size, "tied_embeddings": False}
    return random_decoder(settings)


@pytest.fixture(scope="module")
def changes(base: Decoder) -> dict[str, Change]:
    only = ("qkv_proj", "down_proj")  # one matrix of each MLP and attention: the other is as it was
    return {"support": random_change(base.config, 1), "zh": random_change(base.config, 2, only=only)}


@pytest.fixture(scope="module")
def torch_model(base: Decoder, changes: dict[str, Change]) -> Decoder:
    model = copy.deepcopy(base)
    attach_changes(model, changes)
    pack_linear_layers(model)
    return model


@pytest.fixture(scope="module")
def fused_model(base: Decoder, changes: dict[str, Change]) -> FusedDecoder:
    weights = fuse_weights(base.config, ((name, p.detach()) for name, p in base.named_parameters()), "int8")
    packed = {name: pack_change(base.config, change, weights) for name, change in changes.items()}
    return FusedDecoder(base.config, weights, adapters=packed, cache_dtype="int8")


@pytest.mark.parametrize("speculation", ["ngram", "off"])
def test_a_mixed_batch_gives_what_each_merged_model_gives(
    base: Decoder, changes: dict[str, Change], torch_model: Decoder, tiny_tokenizer: Tokenizer, speculation: str
) -> None:
    """Greedy, in float32; with drafts too, which the repeating prompts make come true."""
    jobs = [(PROMPTS[i % len(PROMPTS)], adapter) for i, adapter in enumerate(ADAPTERS)]
    engine = make_engine(torch_model, tiny_tokenizer, speculation=speculation)
    answers = run(engine, [ask(tiny_tokenizer, *job) for job in jobs])
    models = {None: base, **{name: merged(base, change) for name, change in changes.items()}}
    for (text, adapter), answer in zip(jobs, answers, strict=True):
        alone = run(
            make_engine(copy.deepcopy(models[adapter]), tiny_tokenizer, speculation="off"),
            [ask(tiny_tokenizer, text, None)],
        )
        assert answer.tokens == alone[0].tokens, (text, adapter)
    assert len({tuple(answer.tokens[0]) for answer in answers}) == len(answers), "adapters without effect show nothing"


@needs_kernels
def test_a_mixed_batch_of_the_kernels_gives_what_each_gives_alone(
    fused_model: FusedDecoder, tiny_tokenizer: Tokenizer
) -> None:
    jobs = [(PROMPTS[i % len(PROMPTS)], adapter) for i, adapter in enumerate(ADAPTERS)]
    answers = run(make_engine(fused_model, tiny_tokenizer), [ask(tiny_tokenizer, *job) for job in jobs])
    for job, answer in zip(jobs, answers, strict=True):
        engine = make_engine(fused_model, tiny_tokenizer)
        engine.settle()
        assert run(engine, [ask(tiny_tokenizer, *job)])[0].tokens == answer.tokens
    assert len({tuple(answer.tokens[0]) for answer in answers}) == len(answers)


@pytest.mark.parametrize("kind", ["torch", pytest.param("kernels", marks=needs_kernels)])
def test_adapters_share_no_cached_prefix(kind: str, request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> None:
    """The same prompt again is found in the cache by its own adapter only."""
    engine = make_engine(request.getfixturevalue(f"{'torch' if kind == 'torch' else 'fused'}_model"), tiny_tokenizer)
    text = "从前有一只狐狸，它住在山里。Once upon a time there was a fox. " * 3
    seen: dict[str | None, list[int]] = {}
    for adapter in (None, "support", "zh", "support", None, "zh"):
        answer = run(engine, [ask(tiny_tokenizer, text, adapter)])[0]
        assert answer.usage is not None
        assert (answer.usage.cached_tokens > 0) == (adapter in seen), adapter
        assert seen.setdefault(adapter, answer.tokens[0]) == answer.tokens[0]
    assert len(set(map(tuple, seen.values()))) == 3


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3}, {"n": 3, "temperature": 1.0, "seed": 5}]
)
def test_searches_and_several_answers_stay_with_their_adapter(
    base: Decoder, changes: dict[str, Change], torch_model: Decoder, tiny_tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    found = run(
        make_engine(torch_model, tiny_tokenizer),
        [ask(tiny_tokenizer, PROMPTS[0], "zh", 12, **settings), ask(tiny_tokenizer, PROMPTS[1], "support", 12)],
    )
    alone = make_engine(merged(base, changes["zh"]), tiny_tokenizer)
    assert run(alone, [ask(tiny_tokenizer, PROMPTS[0], None, 12, **settings)])[0].tokens == found[0].tokens


@needs_kernels
def test_arrivals_aborts_and_preemption_with_adapters(fused_model: FusedDecoder, tiny_tokenizer: Tokenizer) -> None:
    """Requests come and go, and the cache is too small for all: who ends has the answer that it has alone."""
    jobs = [(PROMPTS[i % 4], adapter, 30) for i, adapter in enumerate(ADAPTERS * 2)]
    arrivals: list[tuple[Any, int, int | None]] = [
        (job, i % 3, 5 if i % 5 == 4 else None) for i, job in enumerate(jobs)
    ]
    runner = ModelRunner(fused_model, num_blocks=12, block_size=16)
    engine = Engine(runner, tiny_tokenizer, EngineConfig(context_length=128))
    played = play(engine, arrivals, lambda *job: ask(tiny_tokenizer, *job))
    assert any(answer.reasons == ["abort"] for answer, _ in played)
    ended = {job: answer.tokens for answer, job in played if answer.reasons == ["length"]}
    assert {adapter for _, adapter, _ in ended} == {None, "support", "zh"}
    for job, tokens in ended.items():
        assert run(make_engine(fused_model, tiny_tokenizer), [ask(tiny_tokenizer, *job)])[0].tokens == tokens


def test_an_unknown_adapter_is_refused(torch_model: Decoder, base: Decoder, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no adapter 'zhh': there are support, zh") as refused:
        make_engine(torch_model, tiny_tokenizer).add(ask(tiny_tokenizer, "狐狸", "zhh"))
    assert refused.value.param == "adapter"
    with pytest.raises(UsageError, match="none was loaded"):
        make_engine(base, tiny_tokenizer).add(ask(tiny_tokenizer, "狐狸", "zh"))
