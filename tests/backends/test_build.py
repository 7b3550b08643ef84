"""Which weights and which loops a model gets: defaults, wishes, wishes that exclude each other, short memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bimo
from bimo.backends import build
from bimo.backends.build import QUANTS, choose_precision, need_memory
from bimo.engine.fused import FusedCache
from bimo.engine.kernels import load_kernels
from bimo.errors import UsageError
from bimo.formats.gguf import write_gguf
from bimo.formats.huggingface import load_weights, read_config
from bimo.models.config import DecoderConfig
from bimo.quant.weights import QuantisedWeight, round_weight

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="the C++ kernels are not built")
CONFIG = DecoderConfig(
    family="llama", vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=96, max_positions=128,
)  # fmt: skip


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BIMO_KERNELS", "0")
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


@needs_kernels
def test_the_default_is_int8_where_the_kernels_run() -> None:
    found = choose_precision(CONFIG)
    assert (found.quant, found.fused, found.cache_dtype) == ("int8", True, "int8")
    assert "fastest" in found.why


@needs_kernels
def test_a_number_type_that_is_asked_for_is_kept() -> None:
    found = choose_precision(CONFIG, dtype="float32")
    assert (found.quant, found.fused, found.dtype) == ("none", False, "float32")
    assert choose_precision(CONFIG, dtype="auto").quant == "int8"


@needs_kernels
def test_a_model_the_kernels_cannot_run_is_served_by_torch() -> None:
    found = choose_precision(dataclasses.replace(CONFIG, head_dim=12))
    assert (found.quant, found.fused) == ("none", False)
    assert "a head of 12" in found.why


@pytest.mark.usefixtures("no_kernels")
def test_without_the_kernels_plain_torch_serves() -> None:
    assert choose_precision(CONFIG).quant == "none"
    for quant in QUANTS:
        assert not choose_precision(CONFIG, quant=quant).fused
    assert choose_precision(CONFIG, quant="int8", dtype=None).name.startswith("int8 widened to")
    with pytest.raises(UsageError, match="needs quantised weights and the kernels"):
        choose_precision(CONFIG, quant="int8", cache_dtype="int8")


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"quant": "int5"}, "quant must be one of int8, int4, file, none"),
        ({"quant": "int8", "dtype": "float32"}, 'give quant="none" or leave'),
        ({"cache_dtype": "int3"}, "kv_cache_dtype must be one of auto, int8, bfloat16"),
        ({"quant": "none", "cache_dtype": "int8"}, "leave kv_cache_dtype out"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_wishes_that_make_no_sense(wishes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_precision(CONFIG, **wishes)


@pytest.mark.parametrize(("free", "mend"), [(1 << 30, "smaller model"), (6 << 30, "--quant int4")])
def test_a_model_too_large_for_the_memory_is_refused(free: int, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: free)
    large = dataclasses.replace(
        CONFIG, vocab_size=32000, hidden_size=4096, num_layers=32, intermediate_size=11008, num_heads=32, head_dim=128
    )
    with pytest.raises(UsageError, match=rf"\d\.\d\d billion weights need \d+ MB.*{free >> 20} MB are free.*{mend}"):
        need_memory(large, choose_precision(large, quant="int8"))
    need_memory(CONFIG, choose_precision(CONFIG))


@pytest.mark.parametrize("quant", ["int8", "int4", "none"])
def test_greedy_text_with_and_without_kernels(
    quant: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rounded weights: the first tokens agree, though activations are rounded differently."""
    answers = []
    for wanted in ("1", "0"):
        monkeypatch.setenv("BIMO_KERNELS", wanted)
        load_kernels.cache_clear()
        with bimo.load(str(tiny_model_dir), quant=quant) as model:
            answers.append(model.generate("床前明月光，🦊 hello", max_tokens=4, temperature=0.0).tokens)
            assert model.backend.info().quant == quant
    load_kernels.cache_clear()
    assert answers[0][:1] == answers[1][:1]


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.usefixtures("no_kernels")
def test_plain_torch_computes_with_the_rounded_weights(quant: str, tiny_model_dir: Path) -> None:
    config = read_config(tiny_model_dir)
    model = build.build_model("tiny", tiny_model_dir, config, choose_precision(config, quant=quant))
    name = "embed_tokens.weight"
    (weight,) = (tensor for key, tensor in load_weights(tiny_model_dir, config) if key == name)
    rounded = round_weight(name, weight, quant, tied=config.tied_embeddings)
    expected = rounded.dequantise() if isinstance(rounded, QuantisedWeight) else weight.float()
    found = model.state_dict()[name].float()
    assert torch.equal(found, expected.to(model.state_dict()[name].dtype).float())
    assert isinstance(rounded, QuantisedWeight) == config.tied_embeddings


def test_the_file_s_own_weights(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "q8_0")
    with bimo.load(str(tmp_path / "tiny.gguf"), quant="file") as model:
        found = model.generate("hello", max_tokens=8, temperature=0.0).tokens
    with bimo.load(str(tmp_path / "tiny.gguf"), quant="int8") as model:  # Q8_0 rounded to 8 bits again: the same
        assert model.generate("hello", max_tokens=8, temperature=0.0).tokens == found
    with pytest.raises(UsageError, match=r'quant "file".*is none: give the \.gguf file'):
        bimo.load(str(tiny_model_dir), quant="file")


@needs_kernels
def test_int8_keys_and_values(tiny_model_dir: Path) -> None:
    """Half the memory; on a random model the first token of an answer is not changed by it."""
    with bimo.load(str(tiny_model_dir), kv_cache_dtype="bfloat16") as wide, bimo.load(str(tiny_model_dir)) as narrow:
        assert (wide.backend.info().cache_dtype, narrow.backend.info().cache_dtype) == ("bfloat16", "int8")
        prompt = "The quick brown fox 敏捷的棕色狐狸"
        one, other = (m.generate(prompt, max_tokens=1, temperature=0.0, logprobs=5) for m in (wide, narrow))
        assert one.tokens == other.tokens


@needs_kernels
def test_an_int8_cache_takes_half_the_memory(tiny_model_dir: Path) -> None:
    config = read_config(tiny_model_dir)
    wide, narrow = (FusedCache(config, 64, dtype) for dtype in ("bfloat16", "int8"))
    sizes = [sum(pool.nbytes for pool in (cache.keys, cache.values, *(cache.scales or ()))) for cache in (wide, narrow)]
    assert sizes[1] == (0.5 + 2 / config.head_dim) * sizes[0]  # and a float32 scale a token and head


def test_a_kernel_package_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bimo_kernels = pytest.importorskip("bimo_kernels")
    monkeypatch.setattr(bimo_kernels, "INTERFACE", 1)
    load_kernels.cache_clear()
    assert load_kernels() is None
    assert "build it again with `make setup`" in caplog.text
    load_kernels.cache_clear()


def test_a_process_that_forks_is_told(tiny_model_dir: Path) -> None:
    with bimo.load(str(tiny_model_dir)) as model:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                model.generate("hello", max_tokens=1)
            except BaseException as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert b"load it again" in os.read(reader, 1000)
        assert model.generate("hello", max_tokens=1).tokens  # the parent goes on


def test_more_threads_than_cores(tiny_model_dir: Path) -> None:
    code = "import bimo, sys; print(bimo.load(sys.argv[1]).generate('你好', max_tokens=20, temperature=0).tokens)"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_model_dir)],
            env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for threads in ("1", "2", "9")
    }  # fmt: skip
    assert len(answers) == 1


@needs_kernels
def test_a_step_is_one_parallel_region_and_asks_for_no_new_memory_for_scores(tiny_model_dir: Path) -> None:
    """What a step costs beside its arithmetic, counted: regions entered, memory of the logits, requests computed."""
    kernels = pytest.importorskip("bimo_kernels")
    with bimo.load(str(tiny_model_dir), speculation="off") as model:
        fused = model.backend.engine.runner.model.fused
        step, places = fused.step, []

        def noted(*args: Any, **more: Any) -> Any:
            found = step(*args, **more)
            places.append(found[1].ctypes.data)
            return found

        fused.step = noted
        engine = model.backend.engine
        engine.config = dataclasses.replace(engine.config, stream_interval=1e9)  # not by the clock
        regions, steps = kernels.parallel_regions(), model.backend.stats().steps
        found = model.generate(
            "从前有一个小小的模型", n=5, max_tokens=20, temperature=0.0, ignore_eos=True, min_tokens=20
        )
        assert [len(completion.tokens) for completion in found] == [20] * 5
        steps = model.backend.stats().steps - steps
    assert kernels.parallel_regions() - regions == steps <= 22  # five prompts together, twenty tokens
    assert len(places) <= 6  # several steps a call (engine.multistep)
    assert len(set(places)) <= 3  # it grows with the batch, then stays
