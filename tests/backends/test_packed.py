"""Packed weights on disk: the same numbers come back, without torch; a file that is not whole or not current is made
again, and one that cannot be written costs nothing but time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from bimo.backends import build, packed
from bimo.backends.build import choose_precision
from bimo.backends.local import LocalBackend
from bimo.backends.packed import PackedFile
from bimo.engine import fused as engine_fused
from bimo.engine.fused import FusedWeights
from bimo.engine.fusing import fuse_weights
from bimo.engine.kernels import load_kernels
from bimo.engine.request import Output, Request, SamplingParams
from bimo.formats.hub import remove_model
from bimo.formats.huggingface import load_weights, read_config

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="the C++ kernels are not built")


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of its own, in a cache of its own."""
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "home" / "models" / "模型"))


def fused(directory: Path, quant: str = "int8") -> FusedWeights:
    config = read_config(directory)
    return fuse_weights(config, load_weights(directory, config), quant)


def build_it(directory: Path) -> None:
    config = read_config(directory)
    build.build_model(str(directory), directory, config, choose_precision(config, quant="int8"))


def same(one: FusedWeights, other: FusedWeights) -> bool:
    def parts(weights: FusedWeights) -> dict[str, np.ndarray]:
        found = dict(weights.vectors)
        for name, m in weights.matrices.items():
            found |= {
                f"{name}.codes": m.codes,
                f"{name}.scales": m.scales,
                f"{name}.shape": np.array([m.rows, m.columns]),
            }
            found |= {} if m.bias is None else {f"{name}.bias": m.bias}
        return found

    a, b = parts(one), parts(other)
    assert a.keys() == b.keys() and one.rope_factor == other.rope_factor
    return all(a[name].dtype == b[name].dtype and np.array_equal(a[name].ravel(), b[name].ravel()) for name in a)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_what_was_written_is_read(model: Path, quant: str) -> None:
    file, weights = PackedFile(model, model, quant), fused(model, quant)
    assert file.read() is None
    file.write(weights)
    found = file.read()
    assert found is not None and same(found, weights)
    assert PackedFile(model, model, "int4" if quant == "int8" else "int8").read() is None
    with safe_open(file.path, "np") as opened:  # any tool can look inside
        assert any(name.endswith(".codes") for name in opened.keys())  # noqa: SIM118
    assert list(file.path.parent.iterdir()) == [file.path]


def test_the_second_start_reads_them_and_imports_no_torch(model: Path) -> None:
    code = (
        "import sys, bimo\n"
        f"with bimo.load({str(model)!r}) as model:\n"
        "    for sampling in ({'temperature': 0.0}, {'temperature': 0.8, 'top_p': 0.9, 'seed': 1},\n"
        "                     {'temperature': 1.0, 'seed': 2, 'logprobs': 3}, {'num_beams': 2, 'temperature': 0.0}):\n"
        "        print(model.generate('你好 hello', max_tokens=9, **sampling).tokens)\n"
        "print('torch' in sys.modules)\n"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    ]
    assert told[0].endswith("True\n") and told[1].endswith("False\n")
    assert told[0].splitlines()[:-1] == told[1].splitlines()[:-1]


def test_another_model_in_the_same_place_is_not_mistaken(model: Path) -> None:
    build_it(model)
    assert PackedFile(model, model, "int8").read() is not None
    weights = next(model.glob("*.safetensors"))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert PackedFile(model, model, "int8").read() is None


def test_another_version_of_the_kernels_or_of_rounding_packs_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_it(model)
    for name in ("ROUNDING", "INTERFACE"):
        with monkeypatch.context() as patch:
            patch.setattr(packed, name, 10**6)
            assert PackedFile(model, model, "int8").read() is None
    assert PackedFile(model, model, "int8").read() is not None


def test_a_quiet_moment_ends_the_file_s_part(model: Path) -> None:
    """A start maps the file. Later the weights are copied, answers stay as they are, those under way too, and the file
    may be cut off: a page that is no longer there would kill the process."""
    build_it(model)
    backend = LocalBackend.load(str(model), quant="int8", speculation="off")
    decoder, pool = backend.engine.runner.model, backend.engine.runner.cache.keys
    assert decoder._mapped is not None
    prompt = backend.tokenizer.encode("你好 hello")

    def answer(name: str, seen: list[Output] | None = None) -> list[int]:
        async def ask() -> list[int]:
            found: list[int] = []
            sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
            async for output in backend.generate(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)):
                found += output.token_ids
                if seen == []:  # half way, in the engine's thread
                    backend._commands.put(backend.engine.settle)
                    backend.engine.interrupt()
                    seen.append(output)
            return found

        return asyncio.run(ask())

    with backend:
        before = answer("before")
        assert len(before) == 40 and decoder._mapped is not None
        assert answer("between", []) == before and decoder._mapped is None
        assert decoder.fused.weight_bytes and backend.engine.runner.cache.keys is pool
        with PackedFile(model, model, "int8").path.open("r+b") as stream:
            stream.truncate(10)
        assert answer("after") == before


def test_without_room_for_a_copy_the_file_stays_mapped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_it(model)
    with LocalBackend.load(str(model), quant="int8") as backend:
        decoder = backend.engine.runner.model
        was = decoder.fused
        monkeypatch.setattr(engine_fused, "available_memory", lambda: 1000)
        decoder.settle()
        assert decoder.fused is was


def damages(content: bytes) -> dict[str, bytes]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def with_header(changed: dict) -> bytes:
        encoded = json.dumps(changed).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]

    name = next(name for name in header if name.endswith(".codes"))
    about = json.loads(header["__metadata__"]["bimo"])
    return {
        "empty": b"",
        "cut in the header": content[:100],
        "cut in a weight": content[:-5],
        "no header": b"\xff" * 8 + content[8:],
        "not JSON": content[:8] + b"{" * length + content[8 + length :],
        "a list": with_header([]),  # type: ignore[arg-type]
        "no metadata": with_header({k: v for k, v in header.items() if k != "__metadata__"}),
        "another size": with_header(header | {name: header[name] | {"shape": [10**12]}}),
        "another place": with_header(header | {name: header[name] | {"data_offsets": [7, 9]}}),
        "an unknown type": with_header(header | {name: header[name] | {"dtype": "C128"}}),
        "a matrix missing": with_header(
            header | {"__metadata__": {"bimo": json.dumps(about | {"matrices": {"no such": ["block8", 1, 1]}})}}
        ),
    }


def test_a_damaged_file_is_made_again(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_it(model)
    file = PackedFile(model, model, "int8")
    content = file.path.read_bytes()
    for name, damage in damages(content).items():
        file.path.write_bytes(damage)
        caplog.clear()
        assert file.read() is None, name
        assert "made again" in caplog.text, name
    build_it(model)
    assert file.path.read_bytes() == content


@pytest.mark.parametrize("change", ["a norm is gone", "a norm is short", "frequencies are short", "a matrix is gone"])
def test_a_whole_file_of_another_shape_is_made_again(
    change: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing in it may lead the kernels outside their memory."""
    weights = fused(model)
    norm = "layers.0.attention_norm.weight"
    match change:
        case "a norm is gone":
            del weights.vectors[norm]
        case "a norm is short":
            weights.vectors[norm] = weights.vectors[norm][:1]
        case "frequencies are short":
            weights.vectors["frequencies"] = weights.vectors["frequencies"][:1]
        case _:
            del weights.matrices["layers.0.mlp.down_proj"]
    file = PackedFile(model, model, "int8")
    file.write(weights)
    build_it(model)
    assert "made again" in caplog.text
    found = file.read()
    assert found is not None and same(found, fused(model))


def test_no_room_on_the_disk_costs_only_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "_write", full)
    build_it(model)
    assert "the next start takes seconds longer" in caplog.text and "No space" in caplog.text
    assert [path for path in (model.parents[1] / "packed").rglob("*") if path.is_file()] == []


def test_leftovers_are_swept_up(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    build_it(other)
    (gone,) = (model.parents[1] / "packed" / "other").iterdir()
    shutil.rmtree(other)
    file = PackedFile(model, model, "int8")
    file.path.parent.mkdir(parents=True)
    left = file.path.with_name(f"{file.path.name}.123.partial")
    left.write_bytes(b"cut off by a kill")
    build_it(model)
    assert file.path.exists() and not gone.exists() and not left.exists() and not gone.parent.exists()


def test_removing_a_model_removes_them(model: Path) -> None:
    build_it(model)
    folder = model.parents[1] / "packed" / model.name
    size = sum(path.stat().st_size for path in [*folder.iterdir(), *model.iterdir()])
    assert remove_model(model.name) == size
    assert not folder.exists()
