"""GGUF files: every number type, every refusal, every way of being damaged. Equal logits are tested in tests/parity."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimo.errors import CorruptModelError, ModelError, ModelNotFoundError, UnsupportedModelError, UsageError
from bimo.formats.gguf import convert_gguf, write_gguf
from bimo.formats.gguf_file import GgufFile
from bimo.formats.huggingface import load_weights, read_config, save_directory
from bimo.models.config import DecoderConfig, RopeConfig
from bimo.models.decoder import Decoder

TYPES = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES]


def can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as bimo writes it."""
    file = tmp_path_factory.mktemp("gguf") / "tiny 小.gguf"
    write_gguf(tiny_model_dir, file, "f16")
    return file


def copy_gguf(
    source: Path, file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | None] | None = None
) -> Path:
    """`source` again, with metadata and tensors changed or added (None: dropped); uint8 tensors are raw BF16."""
    reader = GgufFile(source)
    values = {key: value for key, value in {**reader.metadata, **metadata}.items() if value is not None}
    writer = gguf.GGUFWriter(file, values.pop("general.architecture"))
    for key, value in values.items():
        if key == "general.file_type":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    arrays: dict[str, np.ndarray | None] = {name: reader.read(name, torch.float32).numpy() for name in reader.tensors}
    for name, array in {**arrays, **(tensors or {})}.items():
        if array is not None:
            raw_type = gguf.GGMLQuantizationType.BF16 if array.dtype == np.uint8 else None
            writer.add_tensor(name, array, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(file: Path, kind: type[ModelError]) -> str:
    """Convert, expect an error that names the file, and that nothing appears."""
    target = file.parent / "converted"
    with pytest.raises(kind) as error:
        convert_gguf(file, target)
    message = str(error.value)
    assert message.startswith(str(file)) and "\n" not in message
    assert not target.exists() and not list(file.parent.glob(".*"))
    return message


# -------------------------------------------------------------------------------------------------------- number types
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_number_type_is_read_or_refused_by_name(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = max(block, 8)
    # Bytes below 0x3c keep every scale finite, whether float16, float32 or an exponent.
    shape = (5, columns // block * block_bytes)
    data = np.random.default_rng(3).integers(0, 0x3C, shape, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor_info("t", (5, columns), np.dtype(np.float32), data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(data)
    writer.close()
    file = GgufFile(tmp_path / "one.gguf")
    if can_dequantize(kind):
        tensor = file.read("t", torch.float32)
        assert tensor.shape == (5, columns)
        assert np.array_equal(tensor.numpy(), gguf.dequantize(data, kind).reshape(5, columns))
    else:
        with pytest.raises(UnsupportedModelError, match=f"number type {kind.name}"):
            file.read("t", torch.float32)


def test_large_tensors_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor(
        "t", gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "one.gguf")
    whole = file.read("t", torch.float16)
    monkeypatch.setattr("bimo.formats.gguf_file.CHUNK", 3 * 64)
    heard: list[int] = []
    assert torch.equal(file.read("t", torch.float16, heard.append), whole)
    assert heard == [120, 120, 40] and sum(heard) == file.tensors["t"].nbytes
    assert np.abs(whole.numpy() - values).max() < 0.3


def test_bfloat16_stays_bfloat16(written: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = read_config(tiny_model_dir)
    huge = {name: tensor.bfloat16() * (1e9 if name.endswith("up_proj.weight") else 1)
            for name, tensor in load_weights(tiny_model_dir, config)}  # fmt: skip
    save_directory(tmp_path / "bf16", config, huge.items(), source=tiny_model_dir)
    with pytest.raises(UnsupportedModelError, match="beyond float16's range"):
        write_gguf(tmp_path / "bf16", tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*model.gguf*"))

    name = "blk.0.ffn_up.weight"
    values = GgufFile(written).read(name, torch.float32).numpy() * 1e9
    data = gguf.quantize(values, gguf.GGMLQuantizationType.BF16).view(np.uint8)
    convert_gguf(copy_gguf(written, tmp_path / "bf16.gguf", {}, {name: data}), tmp_path / "back")
    read = dict(load_weights(tmp_path / "back", config))
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    assert read["layers.0.mlp.gate_up_proj.weight"].abs().max() > 1e7


# ------------------------------------------------------------------------------------------------------------- reading
def test_what_is_written_beside_the_weights(written: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    convert_gguf(written, tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "bimo.json",
                     "chat_template.jinja", "generation_config.json"}  # fmt: skip
    lineage = json.loads((tmp_path / "back/bimo.json").read_text())
    assert lineage["converted_from"] == written.name and lineage["source"]["general.architecture"] == "llama"
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] in (2, [2], [2, 0])
    assert dataclasses.replace(read_config(tmp_path / "back"), dropout=0.0) == read_config(tiny_model_dir)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba', only llama, qwen2, qwen3, gpt2"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.attention.sliding_window": 16}, "attention.sliding_window is 16"),
        ({"llama.logit_scale": 0.5}, "logit_scale = 0.5 is unknown"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is 8"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
    ],
)
def test_settings_bimo_does_not_compute(metadata: dict[str, Any], said: str, written: Path, tmp_path: Path) -> None:
    assert said in refusal(copy_gguf(written, tmp_path / "m.gguf", metadata), UnsupportedModelError)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
        ({"llama.block_count": 3}, "lacks 9 tensors (blk.2.attn_norm.weight"),
        ({"llama.embedding_length": 32}, "has the shape"),
        ({"llama.attention.head_count": "four"}, "num_attention_heads should be a whole number"),
        ({"llama.attention.head_count": 0}, "num_attention_heads should be a whole number from 1"),
        ({"llama.attention.head_count_kv": [2, 2]}, "num_key_value_heads should be a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps should be a number"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta should be a number"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    ],
)
def test_impossible_metadata(metadata: dict[str, Any], said: str, written: Path, tmp_path: Path) -> None:
    assert said in refusal(copy_gguf(written, tmp_path / "m.gguf", metadata), CorruptModelError)


def test_rope_settings(written: Path, tmp_path: Path) -> None:
    def rope(metadata: dict[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> RopeConfig:
        convert_gguf(copy_gguf(written, tmp_path / "m.gguf", metadata, tensors), tmp_path / "back")
        return read_config(tmp_path / "back").rope

    scaling = "llama.rope.scaling."
    assert rope({f"{scaling}factor": 2.0}) == RopeConfig(kind="linear", factor=2.0)  # no type is linear to llama.cpp
    assert rope({"llama.rope.scale_linear": 4.0}) == RopeConfig(kind="linear", factor=4.0)
    assert rope({f"{scaling}type": "none", f"{scaling}factor": 2.0}) == RopeConfig()
    yarn = {f"{scaling}type": "yarn", f"{scaling}factor": 4.0, f"{scaling}original_context_length": 128}
    assert rope(yarn) == RopeConfig(kind="yarn", factor=4.0, original_max_positions=128)
    warmer = rope({**yarn, f"{scaling}attn_factor": 2.0}).attention_factor
    assert warmer == pytest.approx(2 * (0.1 * np.log(4) + 1))
    assert rope({}, {"rope_freqs.weight": np.ones(8, np.float32)}) == RopeConfig()


def test_frequency_tables_that_follow_no_rule_are_refused(written: Path, tmp_path: Path) -> None:
    table = np.linspace(1, 3, 8, dtype=np.float32)
    file = copy_gguf(written, tmp_path / "m.gguf", {}, {"rope_freqs.weight": table})
    assert "does not follow Llama 3's rule" in refusal(file, UnsupportedModelError)


def test_tensors_missing_unknown_misshapen_or_not_finite(written: Path, tmp_path: Path) -> None:
    def said(tensors: Mapping[str, np.ndarray | None], kind: type[ModelError] = CorruptModelError) -> str:
        return refusal(copy_gguf(written, tmp_path / "m.gguf", {}, tensors), kind)

    name = "blk.1.ffn_down.weight"
    whole = GgufFile(written).read(name, torch.float32).numpy()
    broken = whole.copy()
    broken[3, 4] = np.nan
    assert f"lacks 1 tensors ({name})" in said({name: None})
    assert "no tensor token_embd.weight" in said({"token_embd.weight": None})
    assert f"{name} has the shape (64, 64)" in said({name: whole[:, :64].copy()})
    assert f"tensor {name} has values that are not finite" in said({name: broken})
    assert "blk.0.ffn_gate_inp.weight" in said({"blk.0.ffn_gate_inp.weight": whole}, UnsupportedModelError)


# ------------------------------------------------------------------------------------------------------------- damage
def test_files_cut_off_anywhere(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    header = min(tensor.offset for tensor in GgufFile(written).tensors.values())
    file = tmp_path / "cut.gguf"
    cuts = [0, 3, 4, 8, 23, 24, 40, *range(100, header, header // 40), header - 40, header, header + 1, len(data) - 1]
    for cut in cuts:
        file.write_bytes(data[:cut])
        message = refusal(file, CorruptModelError)
        assert "cut off" in message or "no GGUF file" in message, (cut, message)


def test_files_that_are_something_else(written: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelNotFoundError, match="no such GGUF file"):
        convert_gguf(file, tmp_path / "converted")
    for data in (b"<html>" * 9, b"\0" * 99, b"PK\x03\x04" * 9):
        file.write_bytes(data)
        assert "is no GGUF file" in refusal(file, CorruptModelError)
    for version in (struct.pack("<I", 1), struct.pack(">I", 3)):
        file.write_bytes(b"GGUF" + version + written.read_bytes()[8:])
        assert "is GGUF version" in refusal(file, UnsupportedModelError)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 2**63, 0),  # tensors without end
        struct.pack("<QQ", 0, 2**63),
        struct.pack("<QQQ", 0, 1, 2**62) + b"key",
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 77),  # an unknown value type
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**40),  # an array without end
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**40),
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99,  # nested arrays
        struct.pack("<QQQ", 0, 1, 2) + b"\xff\xfe" + struct.pack("<II", 4, 1),  # not UTF-8
        (struct.pack("<QQ", 0, 2) + (struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 1)) * 2),  # twice
        struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 9),  # nine dimensions
        struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0),
        struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 33, 8, 0),  # half a block of Q8_0
        struct.pack("<QQQ", 0, 1, 17) + b"general.alignment" + struct.pack("<II", 4, 0),
    ],
)  # fmt: skip
def test_headers_that_lie(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
    refusal(tmp_path / "m.gguf", CorruptModelError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_give_a_model_or_a_model_error(data: st.DataObject, written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    # The metadata before the vocabulary and the tensor table after it hold all structure.
    end = min(tensor.offset for tensor in GgufFile(written).tensors.values())
    places = st.integers(0, 1200) | st.integers(end - 1600, end)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)):
        content[place] = byte
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    target = tmp_path / "converted"
    try:
        convert_gguf(file, target)
    except ModelError as error:
        assert str(error).startswith(str(file)) and not target.exists()
    else:
        shutil.rmtree(target)


# ------------------------------------------------------------------------------------------------------------- writing
LLAMA = {
    "family": "llama", "vocab_size": 640, "hidden_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "intermediate_size": 64, "max_positions": 64,
}  # fmt: skip
QWEN2 = LLAMA | {"family": "qwen2", "qkv_bias": True}
YARN = RopeConfig(kind="yarn", factor=2.0, original_max_positions=32, beta_fast=8.0)
LLAMA3 = RopeConfig(kind="llama3", factor=2.0, original_max_positions=32)


def save_random(directory: Path, source: Path, settings: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = DecoderConfig(**settings)
    save_directory(directory, config, Decoder(config).named_parameters(), source=source)
    return directory


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LLAMA | {"activation": "gelu"}, "activation = 'gelu'"),
        (LLAMA | {"family": "mistral", "windows": (16,)}, r"windows = \(16,\)"),
        (LLAMA | {"rope": YARN}, "rope.beta_fast = 8.0"),
        (LLAMA | {"rope": dataclasses.replace(LLAMA3, low_freq_factor=2.0)}, "rope.low_freq_factor = 2.0"),
        (QWEN2 | {"head_dim": 32}, "head_dim = 32"),
        (QWEN2 | {"rope": LLAMA3}, "rope.kind = 'llama3'"),
        (LLAMA | {"family": "qwen3", "qk_norm": True, "qkv_bias": True, "attention_out_bias": True}, "qkv_bias = True"),
        (
            LLAMA | {
                "family": "gpt_neo", "num_kv_heads": 4, "norm": "layer", "position": "learned", "gated_mlp": False,
                "activation": "gelu_tanh", "attention_out_bias": True, "mlp_bias": True, "attention_scale": 1.0,
            },
            "no architecture for family gpt_neo",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute(
    settings: dict[str, Any], said: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    directory = save_random(tmp_path / "model", tiny_model_dir, settings)
    with pytest.raises(UnsupportedModelError, match=said):
        write_gguf(directory, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_windows_as_wide_as_the_context_mean_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = LLAMA | {"family": "mistral", "windows": (64,)}
    directory = save_random(tmp_path / "model", tiny_model_dir, settings)
    write_gguf(directory, tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert read_config(tmp_path / "back") == DecoderConfig(**LLAMA)  # to GGUF a Mistral is a Llama


def test_unknown_kind_and_too_many_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose f16 or q8_0"):
        write_gguf(tiny_model_dir, tmp_path / "m.gguf", "q4_k")  # type: ignore[arg-type]
    directory = save_random(tmp_path / "small", tiny_model_dir, LLAMA | {"vocab_size": 100})
    with pytest.raises(CorruptModelError, match="the embedding only 100 rows"):
        write_gguf(directory, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_number_types_of_written_files(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = save_random(tmp_path / "model", tiny_model_dir, LLAMA | {"intermediate_size": 40})
    kinds = {}
    for kind in ("f16", "q8_0"):
        write_gguf(directory, tmp_path / f"{kind}.gguf", kind)  # type: ignore[arg-type]
        file = GgufFile(tmp_path / f"{kind}.gguf")
        kinds[kind] = {name: gguf.GGMLQuantizationType(tensor.type).name for name, tensor in file.tensors.items()}
        assert file.metadata["general.file_type"] == {"f16": 1, "q8_0": 7}[kind]
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 640
    assert set(kinds["f16"].values()) == {"F16", "F32"}
    assert kinds["q8_0"]["token_embd.weight"] == "Q8_0" and kinds["q8_0"]["output_norm.weight"] == "F32"
    assert kinds["q8_0"]["blk.0.ffn_down.weight"] == "F16"  # rows of 40 are not made of 32s
