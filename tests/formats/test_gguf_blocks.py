"""A GGUF file's own 4 and 8 bits, taken over without another rounding; judged by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from bimo.errors import CorruptModelError
from bimo.formats import gguf_blocks
from bimo.formats.gguf import convert_gguf, write_gguf
from bimo.formats.gguf_blocks import load_gguf_weights
from bimo.formats.hub import gguf_source
from bimo.formats.huggingface import load_weights, read_config
from bimo.quant.weights import QuantisedWeight

UNPACK = {"Q4_0": gguf_blocks._q4_0, "Q4_1": gguf_blocks._q4_1, "Q4_K": gguf_blocks._q4_k, "Q8_0": gguf_blocks._q8_0}


@pytest.mark.parametrize("name", UNPACK)
def test_blocks_stand_for_what_the_gguf_package_says(name: str) -> None:
    """Random bytes, with finite halves where scales are: every bit of the layout matters."""
    kind = GGMLQuantizationType[name]
    size, num_bytes = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (3, 4, num_bytes), dtype=np.uint8)
    for at in range(0, {"Q4_0": 2, "Q8_0": 2}.get(name, 4), 2):
        raw[..., at : at + 2] = random.normal(0, 0.1, (3, 4)).astype(np.float16)[..., None].view(np.uint8)
    codes, scales, minima = UNPACK[name](raw)
    weight = QuantisedWeight(
        "block8" if minima is None else "block4",
        torch.from_numpy(np.ascontiguousarray(codes.reshape(3, -1))),
        torch.from_numpy(np.ascontiguousarray(scales.reshape(3, -1))),
        None if minima is None else torch.from_numpy(np.ascontiguousarray(minima.reshape(3, -1))),
    )
    expected = dequantize(raw.reshape(3, -1), kind).reshape(3, 4 * size)
    exact = 1e-3 if name == "Q4_K" else 1e-6  # products of Q4_K's factors are rounded to float16
    np.testing.assert_allclose(weight.dequantise().numpy(), expected, atol=exact * np.abs(expected).max())


def requantised(source: Path, target: Path, name: str) -> None:
    """The same file with its matrices in another type."""
    reader = GGUFReader(str(source))
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(str(target), architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            subtype = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], subtype)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType[name] if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q5_0"])
def test_a_model_s_parameters_are_the_converted_ones(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also where rows change places (rotary pairs) and three tensors become one."""
    write_gguf(tiny_model_dir, tmp_path / "plain.gguf")
    requantised(tmp_path / "plain.gguf", tmp_path / "tiny.gguf", name)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    config = read_config(tmp_path / "converted")
    expected = dict(load_weights(tmp_path / "converted", config))
    found = dict(load_gguf_weights(tmp_path / "tiny.gguf", config))
    assert found.keys() == expected.keys()
    kept = 0
    for key, weight in found.items():
        if isinstance(weight, QuantisedWeight):
            kept += 1
            weight = weight.dequantise()
        scale = expected[key].float().abs().max()
        assert (weight.float() - expected[key].float()).abs().max() < 2e-3 * scale, key  # the converted ones are halves
    assert (kept > 0) == (name != "Q5_0")


def test_the_default_model_s_own_bits(smollm2_dir: Path) -> None:
    file = gguf_source("smollm2", smollm2_dir)
    assert file is not None and file.suffix == ".gguf"
    config = read_config(smollm2_dir)
    formats = [w.format for _, w in load_gguf_weights(file, config) if isinstance(w, QuantisedWeight)]
    assert formats.count("block4") == 4 * config.num_layers and formats.count("block8") == 1  # the embedding is Q8_0


def test_a_damaged_scale_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model_dir, tmp_path / "tiny.gguf", "q8_0")
    config = read_config(tiny_model_dir)
    reader = GGUFReader(str(tmp_path / "tiny.gguf"), "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type == GGMLQuantizationType.Q8_0
    tensor.data.reshape(-1)[:2] = np.array([np.nan], np.float16).view(np.uint8)
    reader.data.flush()
    with pytest.raises(CorruptModelError, match=r"blk\.0\.ffn_down\.weight.*fetch it again"):
        list(load_gguf_weights(tmp_path / "tiny.gguf", config))


def test_a_missing_tensor_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    config = read_config(tiny_model_dir)
    with pytest.raises(CorruptModelError, match="is missing"):
        list(load_gguf_weights(tmp_path / "tiny.gguf", replace(config, num_layers=config.num_layers + 1)))
