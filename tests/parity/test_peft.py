"""Adapters against PEFT on tiny random models: what bimo writes PEFT reads and the reverse, with equal logits; equal
gradients; and AdaLoRA's sharing out of ranks, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bimo.adapters.adalora import AdaLoRA, schedule
from bimo.adapters.kinds import attach, load_adapter
from bimo.formats.huggingface import load_model, load_weights
from bimo.formats.merging import lora_matrices, merged_weights
from bimo.formats.peft import read_adapter, write_adapter
from bimo.models.empty import empty_model
from bimo.recipe import AdapterRecipe

TOLERANCE = 2e-5
SMALL = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": 2,
         "vocab_size": 97, "max_position_embeddings": 64, "initializer_range": 0.15}  # fmt: skip
LLAMA = SMALL | {"num_key_value_heads": 2, "attention_bias": True}
CLASSES = {"id2label": {0: "好评", 1: "差评", 2: "neutral"}, "label2id": {"好评": 0, "差评": 1, "neutral": 2}}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 12}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64, "initializer_range": 0.15},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL | CLASSES | {"type_vocab_size": 2}),
    "bert-base": ("BertModel", "BertConfig", SMALL | {"type_vocab_size": 2}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "vocab_size": 97,
         "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.5},
    ),
}  # fmt: skip
KINDS: dict[str, AdapterRecipe] = {
    "lora": AdapterRecipe(rank=4, alpha=12),
    "lora-some": AdapterRecipe(rank=3, alpha=7.5, targets=("q", "v", "down")),
    "dora": AdapterRecipe(rank=4, alpha=12, dora=True, targets=("q", "v", "o", "up")),
    "rslora": AdapterRecipe(rank=4, alpha=12, rslora=True),
    "adalora": AdapterRecipe(kind="adalora", rank=2, initial_rank=4, alpha=24),
    "prefix": AdapterRecipe(kind="prefix", tokens=5),
}
CASES = [
    *(("llama", kind) for kind in KINDS),
    *((name, "lora") for name in MODELS if name != "llama"),
    ("gpt2", "prefix"), ("qwen3", "prefix"), ("bert", "prefix"), ("bert-base", "prefix"),
    ("bert", "dora"), ("bert", "lora-some"), ("bert-base", "adalora"),
    ("t5", "lora-some"), ("t5", "adalora"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (transformers' model, its directory), made once and freshly read each time."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> tuple[Any, Path]:
        kind, config, settings = MODELS[name]
        if not (folder / name).exists():
            torch.manual_seed(3)
            getattr(transformers, kind)(getattr(transformers, config)(**settings)).save_pretrained(folder / name)
        return getattr(transformers, kind).from_pretrained(folder / name).eval(), folder / name

    return make


def ids() -> Tensor:
    return torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def mine(model: Any, name: str) -> Tensor:
    """Logits of bimo's model, or an encoder's hidden states."""
    if name == "t5":
        return model.logits(model(ids(), ids()[:, :7]))
    hidden = model(ids())
    if name.startswith("bert"):
        return model.class_logits(hidden) if model.classifier is not None else hidden
    return model.logits(hidden)


def theirs(model: Any, name: str) -> Tensor:
    if name == "t5":
        return model(input_ids=ids(), decoder_input_ids=ids()[:, :7]).logits
    found = model(input_ids=ids(), attention_mask=torch.ones_like(ids()))
    return found.last_hidden_state if name == "bert-base" else found.logits


def shake(weights: Any) -> None:
    """Values that are not the first ones."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.empty(weight.shape).normal_(0, 0.2, generator=generator))


def close(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_peft_reads_what_bimo_writes(bases: Any, tmp_path: Path, name: str, kind: str) -> None:
    reference, directory = bases(name)
    model = load_model(directory)
    before = mine(model, name)
    adapter = attach(model, KINDS[kind], seed=0, base=str(directory))
    shake(adapter.trained.values())
    expected = mine(model, name)
    assert (expected - before).abs().max() > 0.01
    tensors = adapter.to_file(adapter.trained)
    write_adapter(tmp_path / "a", model.config, KINDS[kind], tensors, base=str(directory), source=directory)
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "a").eval()
    close(theirs(loaded, name), expected)
    again = load_model(directory)  # and bimo itself
    assert load_adapter(again, read_adapter(tmp_path / "a")).num_trained == adapter.num_trained
    close(mine(again, name), expected)


def their_adapter(reference: Any, name: str, kind: str) -> Any:
    recipe = KINDS[kind]
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "bert-base": "FEATURE_EXTRACTION"}.get(name, "CAUSAL_LM")
    torch.manual_seed(4)
    if kind == "prefix":
        config: Any = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=recipe.tokens)
    else:
        modules = {
            "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "v", "wi_1"], "bert": ["query", "value", "output.dense"],
            "bert-base": ["key", "intermediate.dense"],
        }.get(name, ["q_proj", "v_proj", "gate_proj"])  # fmt: skip
        settings = {"task_type": task, "lora_alpha": recipe.alpha, "target_modules": modules}
        if kind == "adalora":
            config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **settings)
        else:
            config = peft.LoraConfig(r=recipe.rank, use_dora=recipe.dora, use_rslora=recipe.rslora, **settings)
    return peft.get_peft_model(reference, config)


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_bimo_reads_what_peft_writes(bases: Any, tmp_path: Path, name: str, kind: str) -> None:
    reference, directory = bases(name)
    wrapped = their_adapter(reference, name, kind)
    shake(weight for weight in wrapped.parameters() if weight.requires_grad)
    wrapped.eval()
    wrapped.save_pretrained(tmp_path)
    expected = theirs(wrapped, name)
    model = load_model(directory)
    adapter = load_adapter(model, read_adapter(tmp_path))
    close(mine(model, name), expected)
    if kind == "prefix":
        return
    weights = dict(merged_weights(load_weights(directory, model.config), model.config, tmp_path))
    adapter.merge()
    close(mine(model, name), expected)
    streamed = empty_model(model.config)
    streamed.load_state_dict(weights, strict=True, assign=True)
    if hasattr(streamed, "reset_rope"):
        streamed.reset_rope()
    close(mine(streamed.eval(), name), expected)


def in_bimos_names(adapter: Any, config: Any, folder: Path, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors by their names in its model -> those of bimo's weights, by way of a file."""
    named = {name.replace(".default", ""): tensor.detach().clone() for name, tensor in values.items()}
    named = {name.replace("_vector.weight", "_vector"): tensor for name, tensor in named.items()}
    save_file(named, folder / "adapter_model.safetensors")
    _, tensors = read_adapter(folder).read(config)
    return adapter.from_file(tensors)


def pair(bases: Any, folder: Path, kind: str, **settings: Any) -> tuple[Any, Any, Any]:
    """An adapter of PEFT on the tiny Llama, and bimo's model with the same one."""
    reference, directory = bases("llama")
    wrapped = their_adapter(reference, "llama", kind)
    shake(weight for weight in wrapped.parameters() if weight.requires_grad)
    for key, value in settings.items():
        setattr(wrapped.peft_config["default"], key, value)
    wrapped.save_pretrained(folder)
    model = load_model(directory)
    return wrapped, model, load_adapter(model, read_adapter(folder))


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "adalora", "prefix"])
def test_gradients_are_pefts(bases: Any, tmp_path: Path, kind: str) -> None:
    wrapped, model, adapter = pair(bases, tmp_path, kind)
    wrapped.eval()
    theirs(wrapped, "llama").square().sum().backward()
    mine(model, "llama").square().sum().backward()
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    if kind == "prefix":
        values = wrapped.prompt_encoder.default.embedding.weight.grad
        expected = {"prompt_embeddings": values}
    else:
        expected = {name: weight.grad for name, weight in wrapped.named_parameters() if weight.requires_grad}
    found = in_bimos_names(adapter, model.config, tmp_path, expected)
    assert set(found) == set(adapter.trained)
    for name, weight in adapter.trained.items():
        close(weight.grad, found[name])  # also of what is 0


def test_ranks_are_shared_out_as_pefts_allocator_does(bases: Any, tmp_path: Path) -> None:
    steps = 20
    warmup, final, every = schedule(steps)
    wrapped, model, adapter = pair(
        bases, tmp_path, "adalora", total_step=steps, tinit=warmup, tfinal=final, deltaT=every
    )
    assert isinstance(adapter, AdaLoRA) and (warmup, final, every) == (2, 6, 1)
    trained = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(2)
    counts = []
    for step in range(1, steps + 1):
        for weight in trained.values():
            weight.grad = torch.empty(weight.shape).normal_(generator=generator)
        gradients = in_bimos_names(adapter, model.config, tmp_path, {n: w.grad for n, w in trained.items()})
        for name, weight in adapter.trained.items():
            weight.grad = gradients[name]
        adapter.after_backward(step, steps)
        wrapped.base_model.update_and_allocate(step)
        adapter.state()  # whatever reads them finds them pruned
        own = in_bimos_names(adapter, model.config, tmp_path, trained)
        for name, weight in adapter.trained.items():
            assert torch.equal(weight, own[name]), (step, name)
        counts.append(sum(int(layer.kept.sum()) for layer in adapter.ranked.values()))
        if step == steps:
            break
        with torch.no_grad():  # an optimiser's step, which moves what was pruned, too
            for weight in trained.values():
                weight.add_(torch.empty(weight.shape).normal_(0, 0.05, generator=generator))
            for name, tensor in in_bimos_names(adapter, model.config, tmp_path, trained).items():
                model.get_parameter(name).copy_(tensor)
    assert counts[:2] == [24, 24] and counts[-7:] == [12] * 7 and counts == sorted(counts, reverse=True)

    wrapped.eval().save_pretrained(tmp_path / "theirs")
    recipe = KINDS["adalora"].model_copy(update={"targets": ("q", "v", "gate")})
    write_adapter(tmp_path / "mine", model.config, recipe, adapter.to_file(adapter.trained), base="x")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mine", "theirs"))
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in other.items()}
    with torch.no_grad():
        expected = theirs(wrapped, "llama")
        close(mine(model, "llama"), expected)
        for folder in (tmp_path / "mine", tmp_path / "theirs"):
            reference, directory = bases("llama")
            close(theirs(peft.PeftModel.from_pretrained(reference, folder).eval(), "llama"), expected)
            again = load_model(directory)
            loaded = load_adapter(again, read_adapter(folder))
            assert isinstance(loaded, AdaLoRA)
            for name, layer in loaded.ranked.items():
                assert torch.equal(layer.kept, adapter.ranked[name].kept)
            close(mine(again, "llama"), expected)


def test_ranks_and_alphas_by_module(bases: Any, tmp_path: Path) -> None:
    reference, directory = bases("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM",
        rank_pattern={"v_proj": 2, "model.layers.1.self_attn.o_proj": 7}, alpha_pattern={"layers.0.*q_proj": 5},
    )  # fmt: skip
    wrapped = peft.get_peft_model(reference, config)
    shake(weight for weight in wrapped.parameters() if weight.requires_grad)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    model = load_model(directory)
    file = read_adapter(tmp_path / "theirs")
    adapter = load_adapter(model, file)
    with torch.no_grad():
        expected = theirs(wrapped, "llama")
        close(mine(model, "llama"), expected)
        recipe, _ = file.read(model.config)
        write_adapter(tmp_path / "mine", model.config, recipe, adapter.to_file(adapter.trained), base="x")
        reference, _ = bases("llama")
        close(theirs(peft.PeftModel.from_pretrained(reference, tmp_path / "mine").eval(), "llama"), expected)
    matrices = lora_matrices(tmp_path / "mine", model.config)
    shapes = [(start, end, a.shape, b.shape) for start, end, a, b in matrices["layers.0.attention.qkv_proj"]]
    assert shapes == [(0, 32, (4, 32), (32, 4)), (48, 64, (2, 32), (16, 2))]
    assert matrices["layers.1.attention.out_proj"][0][2].shape == (7, 32)
