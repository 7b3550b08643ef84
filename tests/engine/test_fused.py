"""The fused C++ step against the plain decoder: every family's parts, every instruction set, any chunks, any company.

The reference is `Decoder` in float32 with the very weights the kernels hold (dequantised), so that only the rounding of
activations (8 bits in groups of 32) and of keys and values is left: a few percent on random models, where a missing
bias, a wrong rotation or a window off by one costs a multiple of that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import pytest
import torch

from bimo.engine.fused import FusedDecoder, can_fuse
from bimo.engine.fusing import fuse_weights
from bimo.engine.kernels import load_kernels
from bimo.engine.request import Request
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence
from bimo.models.config import DecoderConfig, RopeConfig
from bimo.models.decoder import Decoder
from bimo.quant.weights import (
    HADAMARD,
    QuantisedWeight,
    hadamard,
    quantise4,
    quantise8,
    quantise_rows8,
    round_weight,
)

kernels = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the C++ kernels are not built")
SETS = kernels.instruction_sets() if kernels is not None else []

BASE: dict[str, Any] = {
    "family": "llama", "vocab_size": 101, "hidden_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "intermediate_size": 144, "max_positions": 512, "tied_embeddings": False,
}  # fmt: skip
GPT2 = BASE | {
    "norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated_mlp": False, "qkv_bias": True,
    "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "tied": BASE | {"tied_embeddings": True},
    "one key head": BASE | {"num_kv_heads": 1, "num_heads": 6, "head_dim": 16},
    "wide heads": BASE | {"head_dim": 80, "num_heads": 2, "num_kv_heads": 1},
    "widest heads": BASE | {"head_dim": 256, "num_heads": 1, "num_kv_heads": 1},
    "odd inner": BASE | {"intermediate_size": 150},
    "yarn": BASE | {"rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=64)},
    "qwen2": BASE | {"qkv_bias": True, "windows": (None, 5, 300)},
    "qwen3": BASE | {"qk_norm": True, "head_dim": 16, "tied_embeddings": True},
    "gpt2": GPT2,
    "gpt_neo": GPT2 | {"attention_scale": 1.0, "windows": (None, 7, None), "qkv_bias": False},
    "relu": GPT2 | {"activation": "relu"},
    "gelu": GPT2 | {"activation": "gelu"},
}
# widths of a multiple of 64: a scale a row, after the Hadamard transform
ROWS = BASE | {"hidden_size": 128, "intermediate_size": 192}
MODELS |= {
    "rows": ROWS | {"tied_embeddings": True, "qkv_bias": True, "windows": (None, 5, 300)},
    "rows, odd inner": ROWS | {"intermediate_size": 150},
    "rows, odd hidden": ROWS | {"hidden_size": 96},
    "rows, gpt2": GPT2 | {"hidden_size": 128, "intermediate_size": 256},
}
NUM_BLOCKS = 60
NUM_TOKENS = 300  # more than one stretch of 256 keys


def random_decoder(settings: dict[str, Any]) -> Decoder:
    torch.manual_seed(3)
    config = DecoderConfig(**settings)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.7 / parameter.shape[1] ** 0.5 if "embed" not in name else 1.0)
    return decoder


def make(
    settings: dict[str, Any], quant: str = "int8", instruction_set: str = "", cache_dtype: str = "bfloat16"
) -> tuple[FusedDecoder, Decoder]:
    """A fused model, and the plain one that computes with the same rounded weights."""
    decoder = random_decoder(settings)
    rounded: dict[str, torch.Tensor | QuantisedWeight] = {}
    for name, weight in decoder.named_parameters():
        found = round_weight(name, weight.detach(), quant, tied=decoder.config.tied_embeddings)
        if quant == "file" and isinstance(found, QuantisedWeight):  # as Q8_0 has them
            found = quantise8(weight.detach())
        elif name == "embed_tokens.weight" and isinstance(found, torch.Tensor):
            found = found.bfloat16().float()
        rounded[name] = found
    weights = fuse_weights(decoder.config, rounded.items(), quant)
    fused = FusedDecoder(decoder.config, weights, cache_dtype=cache_dtype, instruction_set=instruction_set)
    fused.make_cache(NUM_BLOCKS, 16)
    plain = {name: w.dequantise() if isinstance(w, QuantisedWeight) else w for name, w in rounded.items()}
    decoder.load_state_dict(plain, strict=False)
    return fused, decoder


def blocks_of(number: int) -> list[int]:
    """Blocks of the n-th of three sequences: interleaved and out of order, as after long use."""
    return [*range(number, NUM_BLOCKS, 3)][::-1]


def hidden_of(fused: FusedDecoder, ids: list[int], spans: list[tuple[int, int, list[int]]]) -> torch.Tensor:
    return step(fused, ids, spans, [])[0]


def step(
    fused: FusedDecoder, ids: list[int], spans: list[tuple[int, int, list[int]]], scored: list[int]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    hidden, logits, best = fused.fused.step(ids, spans, scored)
    return torch.from_numpy(hidden), torch.from_numpy(logits), best


def logits_of(fused: FusedDecoder, hidden: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(fused.logits(hidden.numpy()))


def pack(weight: QuantisedWeight) -> Any:
    minima = None if weight.minima is None else weight.minima.numpy()
    return kernels.pack(weight.format, weight.codes.numpy(), weight.scales.numpy(), minima)


def product(matrix: Any, x: torch.Tensor, instruction_set: str) -> torch.Tensor:
    return torch.from_numpy(kernels.product(matrix, x.numpy(), instruction_set))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def ids_of(seed: int, count: int = NUM_TOKENS) -> list[int]:
    return torch.randint(101, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected_hidden(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    return decoder(torch.tensor([ids]))[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", ["int8", "int4", "file"])
def test_every_family_computes_what_the_plain_decoder_does(name: str, quant: str) -> None:
    fused, decoder = make(MODELS[name], quant)
    ids = ids_of(1)
    hidden = hidden_of(fused, ids, [(0, len(ids), blocks_of(0))])
    expected = expected_hidden(decoder, ids)
    assert relative(hidden, expected) < 0.04
    assert relative(hidden[-40:], expected[-40:]) < 0.05
    with torch.inference_mode():
        assert relative(logits_of(fused, hidden), decoder.logits(expected)) < 0.05


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt_neo", "qwen2", "rows"])
def test_every_instruction_set(name: str, cache: str, instruction_set: str) -> None:
    fused, decoder = make(MODELS[name], "int8" if name == "rows" else "int4", instruction_set, cache)
    assert fused.fused.instruction_set == instruction_set
    ids = ids_of(2)
    hidden = hidden_of(fused, ids, [(0, len(ids), blocks_of(1))])
    assert relative(hidden, expected_hidden(decoder, ids)) < 0.05


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "rows"])
def test_a_token_s_result_does_not_depend_on_chunks_or_company(name: str, cache: str, instruction_set: str) -> None:
    """Bit for bit: all at once, in chunks beside others, and token by token. This is why greedy answers repeat."""
    fused, _ = make(MODELS[name], "int8", instruction_set, cache)
    ids = [ids_of(seed, 290) for seed in range(3)]
    whole = [hidden_of(fused, row, [(0, 290, blocks_of(n))]).clone() for n, row in enumerate(ids)]
    fused.make_cache(NUM_BLOCKS, 16)
    starts, sizes = (
        [0, 0, 0],
        [(1, 33, 7), (1, 1, 1), (16, 2, 3), (255, 4, 270), (1, 5, 1), (3, 1, 1), (4, 1, 1), (9, 1, 6)],
    )
    for step in sizes:
        spans = [(starts[n], count, blocks_of(n)) for n, count in enumerate(step)]
        tokens = [token for n, count in enumerate(step) for token in ids[n][starts[n] :][:count]]
        hidden = hidden_of(fused, tokens, spans)
        row = 0
        for n, count in enumerate(step):
            assert torch.equal(hidden[row : row + count], whole[n][starts[n] : starts[n] + count]), (n, starts[n])
            starts[n] += count
            row += count
    logits = logits_of(fused, whole[0])
    for count in (1, 2, 3, 7, 8, 9, 64):
        assert torch.equal(logits_of(fused, whole[0][:count]), logits[:count])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("shape", [(48, 64), (40, 96), (48, 1536), (960, 576), (33, 100), (1, 1), (16, 31)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 23])
def test_products_against_float64(shape: tuple[int, int], rows: int, instruction_set: str) -> None:
    torch.manual_seed(rows)
    weight, x, bias = torch.randn(shape) * 0.1, torch.randn(rows, shape[1]), torch.randn(shape[0])
    x[0, 0] = 50.0  # an outlier costs its own group only
    by_row = [] if shape[1] % HADAMARD else [quantise_rows8(weight)]
    for quantised in (quantise8(weight), quantise4(weight), *by_row):
        packed = pack(quantised).with_bias(bias.numpy())
        if quantised.format == "row8":  # a scale a row, of what the transform makes of it
            values = hadamard(x)
            scale = values.abs().amax(1, keepdim=True) / 127
            rounded = hadamard((values / scale).round() * scale).double()
        else:
            groups = torch.nn.functional.pad(x, (0, -shape[1] % 32)).unflatten(1, (-1, 32)).double()
            scale = (groups.abs().amax(2, keepdim=True) / 127).clamp_min(1e-30)
            rounded = ((groups / scale).round() * scale).flatten(1)[:, : shape[1]]
        expected = rounded @ quantised.dequantise(torch.float64).T + bias.double()
        found = product(packed, x, instruction_set)
        assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def test_numbers_at_the_edge() -> None:
    """Zeros, one huge value, all codes at their extremes: no overflow in 8-bit products on any instruction set."""
    weight = torch.ones(16, 64)
    weight[::2] = -1
    for instruction_set in SETS:
        for x in (
            torch.zeros(1, 64),
            *(torch.full((1, 64), x) for x in (3e38, -1e-38, torch.nan, torch.inf)),
            torch.eye(64),
        ):
            for quantised in (quantise8(weight), quantise_rows8(weight), quantise4(weight)):
                packed = pack(quantised)
                found = product(packed, x, instruction_set)
                expected = x.double() @ weight.double().T
                assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-30) or (
                    not expected.abs().max() < 3e38
                )


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_computes_the_same(threads: int) -> None:
    """Also more threads than cores, of which some come to a step when it is over; many short steps in a row."""
    fused, _ = make(MODELS["qwen2"])
    ids, before = ids_of(10, 33), torch.get_num_threads()
    expected = [t.clone() for t in step(fused, ids, [(0, 33, [1, 2, 3])], [5, 32])[:2]]
    try:
        torch.set_num_threads(threads)
        for _ in range(200):
            found = step(fused, ids, [(0, 33, [1, 2, 3])], [5, 32])[:2]
            assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_long_prompt_is_the_same_however_it_is_shared_out(cache_dtype: str, threads: int) -> None:
    """Threads must not write into the same words of the cache: tokens of a block, pairs of values."""
    fused, _ = make(MODELS["llama"], cache_dtype=cache_dtype)
    ids, spans = ids_of(11, 450), [(0, 150, blocks_of(0)), (0, 300, blocks_of(1))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = hidden_of(fused, ids, spans)
        torch.set_num_threads(threads)
        for _ in range(60):
            assert torch.equal(hidden_of(fused, ids, spans), expected)
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_and_another_thread_compute_the_same() -> None:
    fused, _ = make(MODELS["llama"])
    ids = ids_of(9, 40)
    expected = hidden_of(fused, ids, [(0, 40, [1, 2, 3])]).clone()
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(hidden_of(fused, ids, [(0, 40, [4, 5, 6])])))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
    child = os.fork()
    if child == 0:  # the parent's threads are not here
        same = False
        with contextlib.suppress(BaseException):
            same = torch.equal(hidden_of(fused, ids, [(0, 40, [7, 8, 9])]), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_would_read_outside_is_refused() -> None:
    fused, _ = make(MODELS["gpt2"])
    for ids, spans, words in [
        ([], [], "at least one token"),
        ([101], [(0, 1, [0])], "vocabulary"),
        ([-1], [(0, 1, [0])], "vocabulary"),
        ([1], [(0, 2, [0])], "differ in number"),
        ([1], [(0, 1, [])], "beyond its blocks"),
        ([1], [(16, 1, [0])], "beyond its blocks"),
        ([1], [(0, 1, [NUM_BLOCKS])], "outside the cache"),
        ([1], [(0, 1, [-1])], "outside the cache"),
        ([1], [(-1, 1, [0])], "start"),
        ([1], [(512, 1, list(range(40)))], "beyond the model"),
    ]:
        with pytest.raises(ValueError, match=words):
            hidden_of(fused, ids, spans)
    for row in (-1, 1):
        with pytest.raises(ValueError, match="a scored row outside"):
            fused.fused.step([1], [(0, 1, [0])], [row])
    with pytest.raises(ValueError, match="no instructions"):
        product(pack(quantise8(torch.ones(1, 1))), torch.ones(1, 1), "avx1024")


def test_a_weight_of_another_shape_is_refused() -> None:
    config = DecoderConfig(**BASE)
    weights = {name: p.detach() for name, p in random_decoder(BASE).named_parameters()}
    weights["layers.1.attention.out_proj.weight"] = torch.zeros(96, 64)
    with pytest.raises(ValueError, match="out of another shape"):
        FusedDecoder(config, fuse_weights(config, weights.items(), "int8"))


def test_what_cannot_be_fused_is_said() -> None:
    assert can_fuse(DecoderConfig(**BASE)) is None
    assert "head of 8" in str(can_fuse(DecoderConfig(**BASE | {"head_dim": 8})))
    assert "hidden_size 40" in str(can_fuse(DecoderConfig(**BASE | {"hidden_size": 40})))


def test_forked_blocks_take_their_scales_along() -> None:
    fused, _ = make(MODELS["llama"], cache_dtype="int8")
    cache = fused.make_cache(NUM_BLOCKS, 16)
    ids = ids_of(4, 20)
    hidden_of(fused, ids[:19], [(0, 19, [3, 4])])
    cache.copy_blocks([(4, 9)])
    expected = hidden_of(fused, ids[19:], [(19, 1, [3, 4])])
    assert torch.equal(hidden_of(fused, ids[19:], [(19, 1, [3, 9])]), expected)


def test_leftovers_of_another_sequence_do_no_harm() -> None:
    """A block that held NaN (of a broken request) is clean for the next one."""
    fused, _ = make(MODELS["llama"])
    cache = fused.make_cache(NUM_BLOCKS, 16)
    expected = hidden_of(fused, ids_of(5, 5), [(0, 5, [0])]).clone()
    cache.keys.fill(0x7FC0)  # NaN in bfloat16
    cache.values.fill(0x7FC0)
    assert torch.equal(hidden_of(fused, ids_of(5, 5), [(0, 5, [0])]), expected)


def test_a_plan_of_the_scheduler() -> None:
    fused, _ = make(MODELS["llama"])
    ids = ids_of(6, 9)
    sequence = Sequence(
        request=Request(prompt_token_ids=ids), index=0, arrival=0, token_ids=ids, num_prompt=9, max_tokens=1, blocks=[7]
    )
    hidden, logits, best = fused.run([Scheduled(sequence, 0, 9)], [2, 8])
    assert torch.equal(torch.from_numpy(hidden), hidden_of(fused, ids, [(0, 9, [7])]))
    assert logits.shape == (2, fused.config.vocab_size) and len(best) == 2


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_step_gives_the_logits_of_the_rows_asked_for_and_the_first_of_the_likeliest_words(instruction_set) -> None:
    fused, _ = make(MODELS["llama"], instruction_set=instruction_set)
    ids = ids_of(8, 40)
    for scored in ([39], [0, 5, 39], [39, 3], list(range(40)), []):
        hidden, logits, best = step(fused, ids, [(0, 40, [1, 2, 3])], scored)
        assert torch.equal(logits, logits_of(fused, hidden[scored]))
        assert best == logits.argmax(-1).tolist()
    # every word the same: the first is taken
    for matrix in fused.fused._kept:
        if getattr(matrix, "rows", 0) == fused.config.vocab_size:
            matrix.scales.fill(0)
    hidden, logits, best = step(fused, ids, [(0, 40, [1, 2, 3])], [0, 39])
    assert not logits.any() and best == [0, 0]
