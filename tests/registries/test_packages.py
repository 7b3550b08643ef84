"""Packages become whole folders, or one clear sentence; whatever the registry, the archive or a kill does.

Wheels come from a folder made here (pip's own --find-links); other clients from the real registry once each, and else
from a stand-in on PATH that leaves an archive made here, as the real one would.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from bimo.errors import BimoError, DownloadError, UsageError
from bimo.registries.packages import fetch_package
from tests.formats.test_hub import home, index
from tests.formats.test_hub import make_wheel as make_named_wheel

__all__ = ["home", "index"]


def silent(label: str, done: int, total: int) -> None:
    """No progress."""


def make_wheel(folder: Path, members: Mapping[str, bytes | Path]) -> Path:
    return make_named_wheel(folder, "toy_data", "1.0", members)


def make_tgz(file: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar.gz; a member that is a `str` is a symbolic link to it."""
    with tarfile.open(file, "w:gz") as tar:
        for name, body in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(body, str):
                member.type, member.linkname = tarfile.SYMTYPE, body
                tar.addfile(member)
            else:
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return file


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str, script: str) -> Path:
    """Put a client of this name first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    file = folder / client
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return file


def nothing_left(home: Path) -> bool:
    return not list(home.glob("data/*")) and not list(home.glob("partial/*"))


# --- the real registries ----------------------------------------------------------------------------------------------


def test_from_pypi(home: Path) -> None:
    folder = fetch_package("pypi:chatterbot-corpus==1.3.3", None, silent)
    assert folder == home / "data" / "pypi-chatterbot-corpus-1.3.3"
    assert "什么是ai" in (folder / "chatterbot_corpus/data/chinese/ai.yml").read_text(encoding="utf-8")


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_from_npm(home: Path) -> None:
    folder = fetch_package("npm:naughty-words@1.2.0", None, silent)
    assert (folder / "zh.json").is_file()  # without npm's folder "package"


@pytest.mark.skipif(not shutil.which("apt-get"), reason="apt-get is not installed")
def test_from_deb(home: Path) -> None:
    folder = fetch_package("deb:libreoffice-help-en-us", None, silent)
    assert len(list(folder.rglob("*.html"))) > 1000
    assert folder.name == "deb-libreoffice-help-en-us"


# --- pinned, once, whole ----------------------------------------------------------------------------------------------


def test_a_package_is_fetched_once_and_compared_with_its_hash(home: Path, index: Path) -> None:
    wheel = make_wheel(index, {"toy/诗.txt": "床前明月光".encode()})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(DownloadError, match=rf"expected sha256 {'0' * 64}, got {digest}"):
        fetch_package("pypi:toy-data==1.0", "0" * 64, silent)
    assert nothing_left(home)
    labels: list[str] = []
    folder = fetch_package("pypi:toy-data==1.0", digest, lambda label, done, total: labels.append(label))
    assert (folder / "toy/诗.txt").read_text(encoding="utf-8") == "床前明月光"
    assert {label.split()[0] for label in labels} == {"fetching", "unpacking"}
    wheel.unlink()
    assert fetch_package("pypi:toy-data==1.0", digest, silent) == folder
    with pytest.raises(DownloadError, match="remove"):
        fetch_package("pypi:toy-data==1.0", "0" * 64, silent)


def test_killed_in_the_middle_nothing_is_taken_for_whole(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tgz(tmp_path / "toy.tgz", {"package/a.txt": b"a"})
    stand_in(tmp_path, monkeypatch, "npm", f"cp '{archive}' . ; echo x >> '{tmp_path}/calls'; sleep 2")
    code = "from bimo.registries.packages import *; print(fetch_package('npm:toy@1.0.0', None, lambda *a: None))"
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 30
    while not (tmp_path / "calls").exists() and time.time() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not list(home.glob("data/*"))
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {each.communicate(timeout=60)[0].strip() for each in children}
    assert outputs == {str(home / "data" / "npm-toy-1.0.0")}
    assert (home / "data" / "npm-toy-1.0.0" / "a.txt").read_bytes() == b"a"
    assert len((tmp_path / "calls").read_text().split()) == 2  # the killed one, and one of the three
    assert not list(home.glob("partial/*"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "pypi:toy",
        "pypi:--index-url==1",
        "pypi:toy==1 --pre",
        "npm:toy",
        "npm:../toy@1.0",
        "npm:toy@git+https://x.y/z",
        "npm:toy@^1.0",
        "npm:@a/b/c@1.0",
        "deb:-o=1",
        "deb:../x",
        "conda:toy==1.0",
        "pypi:",
    ],
)
def test_references_that_a_client_would_take_for_something_else(home: Path, reference: str) -> None:
    with pytest.raises(UsageError, match="write"):
        fetch_package(reference, None, silent)
    assert not home.exists()


def test_no_such_package(home: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"has no toy-data==1\.0") as caught:
        fetch_package("pypi:toy-data==1.0", None, silent)
    assert caught.value.param == "path"
    stand_in(tmp_path, monkeypatch, "npm", "echo 'npm error code ETARGET' >&2; exit 1")
    with pytest.raises(UsageError, match="no package of that name and version"):
        fetch_package("npm:toy@1.0", None, silent)
    stand_in(tmp_path, monkeypatch, "apt-get", "echo 'E: Unable to locate package toy' >&2; exit 100")
    stand_in(tmp_path, monkeypatch, "dpkg-deb", "exit 0")
    with pytest.raises(UsageError, match="apt-get update"):
        fetch_package("deb:toy", None, silent)
    assert nothing_left(home)


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DownloadError, match="not reachable") as caught:
        fetch_package("pypi:toy-data==1.0", None, silent)
    assert "\n" not in str(caught.value)
    assert nothing_left(home)


def test_no_client(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for reference, client in (("npm:toy@1.0", "npm"), ("deb:toy", "apt-get")):
        with pytest.raises(DownloadError, match=f"fetched with {client}, which is not installed"):
            fetch_package(reference, None, silent)
    assert nothing_left(home)


def test_a_wheel_that_leads_out_of_its_folder(home: Path, index: Path) -> None:
    make_wheel(index, {"../../outside.txt": b"x"})
    with pytest.raises(DownloadError, match="leads out of its folder"):
        fetch_package("pypi:toy-data==1.0", None, silent)
    assert nothing_left(home)
    assert not list(home.parent.rglob("outside.txt"))


@pytest.mark.parametrize(
    "members",
    [{"../../../outside.txt": b"x"}, {"package/link": "/etc", "package/link/outside.txt": b"x"}],
    ids=["path", "link"],
)
def test_a_tar_that_leads_out_of_its_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes | str]
) -> None:
    archive = make_tgz(tmp_path / "toy.tgz", members)
    stand_in(tmp_path, monkeypatch, "npm", f"cp '{archive}' .")
    with pytest.raises(DownloadError, match="leads out of its folder"):
        fetch_package("npm:toy@1.0", None, silent)
    assert nothing_left(home)


def test_links_of_a_deb_that_lead_out_are_removed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "apt-get", "touch toy_1.0_all.deb")
    script = (
        'mkdir -p "$3/usr"; echo text > "$3/usr/a.txt"; ln -s a.txt "$3/usr/b.txt"; ln -s /etc/passwd "$3/usr/c.txt"'
    )
    stand_in(tmp_path, monkeypatch, "dpkg-deb", script)
    folder = fetch_package("deb:toy=4:1.0-1", None, silent)
    assert folder.name == "deb-toy-4-1.0-1"
    assert sorted(file.name for file in (folder / "usr").iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("length", [0, 20, 200])
def test_damaged_archives(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    whole = make_tgz(tmp_path / "whole.tgz", {"package/a.txt": os.urandom(5000)}).read_bytes()
    (tmp_path / "toy.tgz").write_bytes(whole[:length])
    stand_in(tmp_path, monkeypatch, "npm", f"cp '{tmp_path}/toy.tgz' .")
    with pytest.raises(DownloadError, match="arrived damaged"):
        fetch_package("npm:toy@1.0", None, silent)
    assert nothing_left(home)
    (tmp_path / "toy.tgz").write_bytes(whole)
    assert (fetch_package("npm:toy@1.0", None, silent) / "a.txt").stat().st_size == 5000  # the lock is free


def test_a_full_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    stand_in(tmp_path, monkeypatch, "npm", "echo 'npm error code ENOSPC' >&2; exit 1")
    with pytest.raises(DownloadError, match=r"no space left.*BIMO_HOME"):
        fetch_package("npm:toy@1.0", None, silent)
    make_wheel(index, {"a.txt": b"x"})

    def fill(label: str, done: int, total: int) -> None:
        if label.startswith("unpacking"):
            raise OSError(28, "No space left on device")

    with pytest.raises(DownloadError, match=r"no space left.*BIMO_HOME"):
        fetch_package("pypi:toy-data==1.0", None, fill)
    assert nothing_left(home)


def test_a_cache_that_is_a_file(home: Path, index: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(BimoError, match="set BIMO_HOME"):
        fetch_package("pypi:toy-data==1.0", None, silent)


def test_ctrl_c_leaves_nothing(home: Path, index: Path) -> None:
    make_wheel(index, {"a.txt": b"x"})

    def interrupt(label: str, done: int, total: int) -> None:
        if label.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_package("pypi:toy-data==1.0", None, interrupt)
    assert nothing_left(home)


def test_nothing_of_a_package_is_run(home: Path, index: Path, tmp_path: Path) -> None:
    """A source package has a script that pip would run to learn its name."""
    proof = tmp_path / "was-run"
    script = textwrap.dedent(f"open({str(proof)!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy-data')\n")
    make_tgz(index / "toy-data-1.0.tar.gz", {"toy-data-1.0/setup.py": script.encode(), "toy-data-1.0/PKG-INFO": b""})
    with pytest.raises(UsageError, match="has no toy-data"):
        fetch_package("pypi:toy-data==1.0", None, silent)
    assert not proof.exists()
