"""Every family against transformers on tiny random models: in, out and through GGUF, logits within 1e-4 in float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bimo.engine.paged import PagedCache, StepAttention
from bimo.engine.request import Request
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence
from bimo.formats.gguf import convert_gguf, write_gguf
from bimo.formats.huggingface import load_weights, read_config, save_directory
from bimo.models.decoder import Decoder

TOLERANCE = 1e-4
NUM_TOKENS = 48  # longer than the sliding windows below, so that they matter

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large weights, so that an error shows in the logits
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GPT_NEO = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64,
    "window_size": 7, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-inner": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
    "gpt_neo": ("gpt_neo", GPT_NEO | {"attention_types": [[["global", "local"], 2]]}),
    "gpt_neo-untied": (
        "gpt_neo",
        GPT_NEO | {"attention_types": [[["local"], 3], [["global"], 1]], "tie_word_embeddings": False},
    ),
    "llama": ("llama", BASE),
    "llama-tied-heads": ("llama", BASE | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("llama", BASE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-head-size": ("llama", BASE | {"head_dim": 12, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}),
    "llama-theta": ("llama", BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "llama-linear": ("llama", BASE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-llama3": ("llama", BASE | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", BASE | {"rope_parameters": YARN}),
    "llama-yarn-options": (
        "llama",
        BASE | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "llama-yarn-mscale": (
        "llama",
        BASE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False}},
    ),
    "mistral": ("mistral", BASE | {"sliding_window": None}),
    "mistral-window": ("mistral", BASE | {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("qwen2", BASE),
    "qwen2-tied-window": (
        "qwen2",
        BASE | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", BASE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        BASE | {
            "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


def make_reference(directory: Path, family: str, settings: dict[str, Any], **save: Any) -> Any:
    """A random transformers model, saved; biases and norms random too, since their initial values hide errors."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    model.save_pretrained(directory, **save)
    return model


def load_decoder(directory: Path) -> Decoder:
    config = read_config(directory)
    decoder = Decoder(config)
    decoder.load_state_dict(dict(load_weights(directory, config)))
    return decoder.eval()


@torch.inference_mode()
def bimo_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.logits(decoder(ids))


@torch.inference_mode()
def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def random_ids(vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_and_out(name: str, tmp_path: Path) -> None:
    family, settings = MODELS[name]
    reference = make_reference(tmp_path / "reference", family, settings)
    decoder = load_decoder(tmp_path / "reference")
    ids = random_ids()
    expected = reference_logits(reference, ids)
    assert expected.std() > 0.5  # a model whose logits are all alike would prove nothing
    assert (bimo_logits(decoder, ids) - expected).abs().max() < TOLERANCE

    save_directory(tmp_path / "saved", decoder.config, decoder.named_parameters(), max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(reference)
    assert torch.equal(reference_logits(again, ids), expected)
    assert read_config(tmp_path / "saved") == decoder.config


def cached_logits(decoder: Decoder, rows: torch.Tensor, chunks: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Logits of two sequences that share the steps of one paged cache, each fed by its own chunk sizes."""
    num_blocks, block_size = 26, 4
    device = decoder.embed_tokens.weight.device
    cache = PagedCache(decoder.config, num_blocks, block_size, torch.float32, device)
    sequences = [
        Sequence(
            request=Request(prompt_token_ids=row.tolist()),
            index=0,
            arrival=number,
            token_ids=row.tolist(),
            num_prompt=NUM_TOKENS,
            max_tokens=1,
            blocks=[*range(number, num_blocks, 2)][::-1],  # interleaved and out of order, as after long use
        )
        for number, row in enumerate(rows)
    ]
    logits: list[list[torch.Tensor]] = [[], []]
    starts = [0, 0]
    with torch.inference_mode():
        for step in zip(*chunks, strict=True):
            work = [Scheduled(sequences[n], starts[n], count) for n, count in enumerate(step)]
            plan = sorted(work, key=lambda item: item.count > 1)
            ids = [token for item in plan for token in item.sequence.token_ids[item.start :][: item.count]]
            positions = [place for item in plan for place in range(item.start, item.start + item.count)]
            row, places = torch.tensor([ids], device=device), torch.tensor([positions], device=device)
            hidden = decoder(row, places, StepAttention(cache, plan))[0]
            for item, part in zip(plan, decoder.logits(hidden).split([item.count for item in plan]), strict=True):
                logits[item.sequence.arrival].append(part)
            starts = [start + count for start, count in zip(starts, step, strict=True)]
    return torch.stack([torch.cat(parts) for parts in logits])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_through_the_paged_cache(name: str, tmp_path: Path, device: str) -> None:
    """Left context in several chunks and single tokens, beside another sequence, with windows crossing the chunks."""
    family, settings = MODELS[name]
    reference = make_reference(tmp_path, family, settings)
    ids = random_ids()
    chunks = ((13, 1, 20, 1, 1, 12), (1, 30, 1, 1, 14, 1))
    assert [sum(sizes) for sizes in chunks] == [NUM_TOKENS] * 2
    logits = cached_logits(load_decoder(tmp_path).to(device), ids, chunks).cpu()
    assert (logits - reference_logits(reference, ids)).abs().max() < TOLERANCE


GGUF_MODELS = (
    "gpt2", "llama", "llama-tied-heads", "llama-biases", "llama-theta", "llama-linear", "llama-llama3", "llama-yarn",
    "mistral", "qwen2", "qwen3",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_round_trip(name: str, kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Out to GGUF and in again: F16 keeps every weight's float16 value, Q8_0 stays within its step."""
    family, settings = MODELS[name]
    source = tmp_path / "reference"
    # More rows than tiny_model_dir's tokenizer has tokens, as models padded to a round vocabulary have.
    make_reference(source, family, settings | {"vocab_size": 640})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tiny_model_dir / file, source / file)
    write_gguf(source, tmp_path / "model.gguf", kind)
    progress: list[tuple[int, int]] = []
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back", lambda done, total: progress.append((done, total)))
    assert progress[-1][0] == progress[-1][1] > 0

    original, back = load_decoder(source), load_decoder(tmp_path / "back")
    half = {name: tensor.half().float() for name, tensor in original.state_dict().items()}
    for name, tensor in back.state_dict().items():
        # A step of Q8_0 is a 127th of its block's largest value: half of that, and room for float16 scales.
        allowed = 0.0 if kind == "f16" else half[name].abs().max() / 200
        assert (tensor - half[name]).abs().max() <= allowed, name
    ids = random_ids(640)
    original.load_state_dict(half)
    expected, logits = bimo_logits(original, ids), bimo_logits(back, ids)
    assert (logits - expected).abs().mean() < (1e-6 if kind == "f16" else 0.05) * expected.std()
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_smollm2_converted_from_gguf_is_the_same_model_to_transformers(smollm2_dir: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    decoder = load_decoder(smollm2_dir)
    for text in ("The capital of France is", "人工智能正在改变世界 🌏", "def add(a, b):\n    return"):
        ids = torch.tensor([tokenizer.encode(text)])
        assert (bimo_logits(decoder, ids) - reference_logits(reference, ids)).abs().max() < 1e-3  # logits reach 30
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[inputs["input_ids"].shape[1] :])
