"""The GGUF files bimo writes, in llama.cpp itself: same tokens, same logits, same greedy text.

Slow: `pip install llama-cpp-python` builds llama.cpp from source (several minutes), then
`pytest -m slow tests/parity/test_llama_cpp.py`.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bimo.formats.gguf import convert_gguf, write_gguf
from bimo.models.decoder import Decoder
from bimo.tokenizer.load import Tokenizer
from tests.parity.test_families import BASE, MODELS, bimo_logits, load_decoder, make_reference, random_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="bimo's GGUF output was not compared with llama.cpp: pip install llama-cpp-python",
    ),
]

PROMPTS = {
    "english": "The capital of France is",
    "story": "Once upon a time, in a village by the sea,",
    "chinese": "人工智能的意思是",
    "code": "def fibonacci(n):\n    ",
    "emoji": "I love 🍕 and 🎉! My favourite",
    "numbers": "1, 2, 3, 4,",
}
NUM_TOKENS = 32
CLOSE = 0.1  # logits this near may swap places: llama.cpp rounds activations to float16 in every product


def open_llama(file: Path, num_tokens: int = 512) -> Any:
    import llama_cpp

    # The cache in float32, so that only the weights' number type counts.
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(file),
        n_ctx=num_tokens,
        n_threads=1,  # its threads spin while they wait, which is slow where others want the cores
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )


def llama_logits(llama: Any, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


@torch.inference_mode()
def last_logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    return decoder.logits(decoder(torch.tensor([ids]))[0, -1])


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Decoder, Tokenizer]:
    return load_decoder(smollm2_dir), Tokenizer.from_directory(smollm2_dir)


@pytest.fixture(scope="module")
def smollm2_f16(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("gguf") / "smollm2-f16.gguf"
    write_gguf(smollm2_dir, file, "f16")
    return open_llama(file)


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text_of_the_f16_file(name: str, smollm2: tuple[Decoder, Tokenizer], smollm2_f16: Any) -> None:
    decoder, tokenizer = smollm2
    ids = tokenizer.encode(PROMPTS[name])
    assert smollm2_f16.tokenize(PROMPTS[name].encode(), add_bos=False, special=True) == ids
    smollm2_f16.reset()
    for theirs, _ in zip(smollm2_f16.generate(ids, temp=0.0, repeat_penalty=1.0), range(NUM_TOKENS), strict=False):
        logits = last_logits(decoder, ids)
        ours = int(logits.argmax())
        if ours != theirs:
            assert logits[ours] - logits[theirs] < CLOSE, f"after {tokenizer.decode(ids)!r}"
            break  # a near tie: from here on both continue different texts
        ids.append(ours)
        if ours in tokenizer.eos_token_ids:
            break


def test_chat_template_and_special_tokens(smollm2: tuple[Decoder, Tokenizer], smollm2_f16: Any) -> None:
    _, tokenizer = smollm2
    assert smollm2_f16.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert smollm2_f16.token_eos() in tokenizer.eos_token_ids
    assert smollm2_f16.n_vocab() == tokenizer.vocab_size
    text = "<|im_start|>user\n你好 👋🏽<|im_end|>\n"
    assert smollm2_f16.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)


def test_logits_of_the_q8_file(smollm2: tuple[Decoder, Tokenizer], smollm2_dir: Path, tmp_path: Path) -> None:
    _, tokenizer = smollm2
    write_gguf(smollm2_dir, tmp_path / "q8.gguf", "q8_0")
    assert (tmp_path / "q8.gguf").stat().st_size < 0.6 * (smollm2_dir / "model.safetensors").stat().st_size
    convert_gguf(tmp_path / "q8.gguf", tmp_path / "back")  # bimo's reading of the very same weights
    decoder, llama = load_decoder(tmp_path / "back"), open_llama(tmp_path / "q8.gguf")
    for prompt in PROMPTS.values():
        ids = tokenizer.encode(prompt)
        # llama.cpp rounds the activations to 8 bits as well, which bimo does not.
        assert_alike(llama_logits(llama, ids)[-1], last_logits(decoder, ids).numpy(), 0.995)


def assert_alike(theirs: np.ndarray, ours: np.ndarray, correlation: float) -> None:
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > correlation
    assert theirs.std() == pytest.approx(ours.std(), rel=0.02)


TINY = {
    **{
        name: MODELS[name]
        for name in (
            "gpt2", "llama", "llama-tied-heads", "llama-biases", "llama-theta", "llama-linear", "llama-llama3",
            "llama-yarn", "mistral", "qwen2", "qwen3",
        )
    },
    "llama-head-size": ("llama", BASE | {"head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_of_tiny_families(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rotary scaling, biases, head sizes and norms mean to llama.cpp what they mean to bimo."""
    family, settings = TINY[name]
    source = tmp_path / "source"
    make_reference(source, family, settings | {"vocab_size": 640})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tiny_model_dir / file, source / file)
    write_gguf(source, tmp_path / "model.gguf", "f16")
    ids = random_ids(512)[:1]
    ours = bimo_logits(load_decoder(source), ids)[0].numpy()
    theirs = llama_logits(open_llama(tmp_path / "model.gguf", 64), ids[0].tolist())
    assert_alike(theirs, ours, 0.9999)
