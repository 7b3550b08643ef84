"""The model directory: what is written is read back, and damage of every kind is named in one sentence."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bimo.errors import BimoError, CorruptModelError, ModelError, ModelNotFoundError, UsageError
from bimo.formats.huggingface import load_weights, read_config, read_json, save_directory
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
)
GPT2 = DecoderConfig(
    family="gpt2",
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=64,
    max_positions=32,
    norm="layer",
    position="learned",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)


def weights(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: parameter.detach().to(dtype) for name, parameter in Decoder(config).named_parameters()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_directory(tmp_path / "model", CONFIG, weights(CONFIG).items())
    return tmp_path / "model"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)


# ---------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 10**9])
def test_weights_and_number_type_survive(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    written = weights(CONFIG, dtype)
    save_directory(tmp_path / "模型 🖌", CONFIG, reversed(written.items()), max_shard_bytes=max_shard_bytes)
    config = read_config(tmp_path / "模型 🖌")
    assert config == CONFIG
    read = dict(load_weights(tmp_path / "模型 🖌", config))
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert read[name].dtype == dtype and torch.equal(read[name], tensor), name
    assert json.loads((tmp_path / "模型 🖌" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_shards_are_small_and_indexed(tmp_path: Path) -> None:
    save_directory(tmp_path, CONFIG, weights(CONFIG).items(), max_shard_bytes=3000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 3000 and sum(sizes) == index["metadata"]["total_size"]


def test_companions_token_ids_and_lineage(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"墨": "🖌"}', encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ 你好 }}", encoding="utf-8")
    (source / "config.json").write_text('{"eos_token_id": 1, "bos_token_id": 3}')
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (source / "optimizer.pt").write_bytes(b"not wanted")
    save_directory(tmp_path / "new", CONFIG, weights(CONFIG).items(), source=source, lineage={"配方": "微调"})
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "new/chat_template.jinja").exists() and not (tmp_path / "new/optimizer.pt").exists()
    raw = read_json(tmp_path / "new/config.json")
    assert (raw["eos_token_id"], raw["bos_token_id"], raw["pad_token_id"]) == ([5, 7], 3, None)
    assert read_json(tmp_path / "new/bimo.json")["配方"] == "微调"


def test_saving_over_a_model_replaces_it(model: Path) -> None:
    (model / "stale.txt").write_text("x")
    doubled = ((name, tensor * 2) for name, tensor in load_weights(model, CONFIG))  # reads what it replaces
    save_directory(model, CONFIG, doubled, source=model)
    assert torch.equal(dict(load_weights(model, CONFIG))["final_norm.weight"], torch.full((16,), 2.0))
    assert not (model / "stale.txt").exists()
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_directory_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a model directory"):
        save_directory(tmp_path / "thesis", CONFIG, weights(CONFIG).items())
    assert (tmp_path / "thesis/chapter.txt").exists()


def test_an_error_of_the_source_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights(CONFIG).items())[:3]
        raise CorruptModelError("the source ends here")

    with pytest.raises(CorruptModelError, match="the source ends here"):
        save_directory(tmp_path / "model", CONFIG, broken(), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[:-1], "1 tensors of the model were not given"),
        (lambda tensors: [*tensors, tensors[0]], "came twice"),
        (lambda tensors: [("lm_head.weight", tensors[0][1]), *tensors], "'lm_head.weight' came twice or is not one"),
        (lambda tensors: [(tensors[0][0], torch.zeros(3, 3)), *tensors[1:]], r"has the shape \(3, 3\)"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, change: Callable, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        save_directory(tmp_path / "model", CONFIG, change(list(weights(CONFIG).items())))
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.formats.test_huggingface import CONFIG, weights
from bimo.formats.huggingface import save_directory
tensors = weights(CONFIG)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))   # the system refuses longer files, as on a full disk
try:
    save_directory(Path(sys.argv[1]), CONFIG, tensors.items())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_the_old_model(model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(model)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"BimoError could not write {model}") and "nothing was changed" in run.stdout
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_loading_is_flat_in_memory(tmp_path: Path) -> None:
    """Reading 64 layers needs no more new memory than a few of them."""
    config = DecoderConfig(**{**CONFIG.to_dict(), "rope": CONFIG.rope, "num_layers": 64, "hidden_size": 256})
    save_directory(tmp_path, config, weights(config).items())
    size = (tmp_path / "model.safetensors").stat().st_size
    largest = 0
    before = anonymous_memory()
    for _ in load_weights(tmp_path, config):
        largest = max(largest, anonymous_memory() - before)
    assert largest < size / 4


def anonymous_memory() -> int:
    """Resident bytes that are not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------- what other tools write
def test_base_models_have_no_prefix_and_old_files_have_buffers(tmp_path: Path) -> None:
    save_directory(tmp_path, GPT2, weights(GPT2).items())

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return bare | {
            "h.0.attn.bias": torch.ones(1, 1, 32, 32),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": bare["wte.weight"].clone(),
        }

    rewrite(tmp_path, as_on_the_hub)
    read = dict(load_weights(tmp_path, GPT2))
    assert all(torch.equal(read[name], tensor) for name, tensor in weights(GPT2).items())


def test_rotary_buffers_are_ignored(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert len(dict(load_weights(model, CONFIG))) == len(weights(CONFIG))


# -------------------------------------------------------------------------------------------------------- hostile input
def corrupt_weights(model: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_weights(model, read_config(model))
    assert "\n" not in str(error.value) and str(model) in str(error.value)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99])
def test_truncated_safetensors(model: Path, kept: float) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    said = corrupt_weights(model)
    assert said.startswith(f"CorruptModelError: {file}") and "is not a whole safetensors file" in said


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 8) + b"\xff\xfe{}\x00\x00\x00\x00",
        struct.pack("<Q", 2) + b"{}",
        b"<html>404 not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_files_that_are_no_safetensors(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    said = corrupt_weights(model)
    assert said.startswith("CorruptModelError")
    assert "git lfs pull" in said if data.startswith(b"version") else "fetch" in said or "lacks" in said


def test_missing_unknown_and_misshapen_tensors_are_named(model: Path) -> None:
    original = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    assert f"lacks 1 of {len(original)} tensors" in (said := corrupt_weights(model)) and name in said
    save_file(original | {"score.weight": torch.ones(2)}, model / "model.safetensors")
    assert "has 1 tensors" in (said := corrupt_weights(model)) and "score.weight" in said
    save_file(original | {name: torch.ones(5, 16)}, model / "model.safetensors")
    assert f"{name} has the shape (5, 16), config.json asks for (24, 16)" in corrupt_weights(model)
    save_file(original | {name: torch.ones(24, 16, dtype=torch.int8)}, model / "model.safetensors")
    assert "UnsupportedModelError" in (said := corrupt_weights(model)) and f"{name} is stored as I8" in said


def test_a_tied_model_with_another_head_is_refused(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | {"lm_head.weight": torch.zeros(40, 16)})
    assert "tie_word_embeddings" in corrupt_weights(model)


def test_index_with_a_missing_shard_or_a_path(model: Path) -> None:
    save_directory(model, CONFIG, weights(CONFIG).items(), max_shard_bytes=3000)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"names the shard {shard.name}, which is missing" in corrupt_weights(model)
    index = model / "model.safetensors.index.json"
    for content, said in (
        ({"weight_map": {"a": "../../etc/passwd"}}, "must be a file in the same directory"),
        ({"weight_map": {}}, "has no"),
        ({"weight_map": 3}, "has no"),
        ([], "has no"),
    ):
        index.write_text(json.dumps(content))
        assert said in corrupt_weights(model)
    index.write_bytes(b'{"weight_map": \xff}')
    assert "is not readable JSON" in corrupt_weights(model)


def test_no_weights_and_pickled_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no model.safetensors" in corrupt_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    said = corrupt_weights(model)
    assert said.startswith("UnsupportedModelError") and "save_pretrained" in said and "pickle" in said


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe{}", b'{"vocab_size": NaN}', b'{"x": -Infinity}', b'{"x": ' + b"9" * 5000 + b"}",
     b"[" * 100_000, "{\"模型\": '}".encode()],
)  # fmt: skip
def test_config_json_that_is_no_json(model: Path, data: bytes) -> None:
    (model / "config.json").write_bytes(data)
    with pytest.raises(CorruptModelError, match="is not readable JSON") as error:
        read_config(model)
    assert str(model / "config.json") in str(error.value) and len(str(error.value)) < 400


def test_missing_directory_and_missing_config(model: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such model directory"):
        read_config(model / "nowhere")
    (model / "config.json").unlink()
    with pytest.raises(CorruptModelError, match=r"config\.json is missing"):
        read_config(model)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BimoError, match="could not write"):
        save_directory(tmp_path / "file" / "model", CONFIG, weights(CONFIG).items())
    shutil.rmtree(tmp_path)
