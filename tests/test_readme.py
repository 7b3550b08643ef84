"""The documents tell the truth: commands and samples run, both languages have the same ones, the tree is complete.

A code block is run when an HTML comment stands above it: `<!-- run -->`, or `<!-- run: server -->` for one that talks
to a server at 127.0.0.1:8000 (the test puts another port there).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = [("README.md", "README.zh.md")] + [
    (f"docs/en/{name}.md", f"docs/zh/{name}.md")
    for name in (
        *("cluster", "finetuning", "index", "kinds", "models"),
        *("python", "recipes", "server", "speed", "training"),
    )
]
TORCHRUN = {
    *("--nnodes", "--nproc-per-node", "--standalone", "--shutdown-timeout"),
    *("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
}
BLOCK = re.compile(r"(<!-- run(?:: server)? -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
TAGGED = re.compile(r"<!-- run(: server)? -->\n```(\w+)\n(.*?)```", re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def samples(*, server: bool) -> list[tuple[str, str, str]]:
    """(name, language, code) of every block that is to be run, from the English pages."""
    found = []
    for english, _ in PAIRS:
        for number, match in enumerate(TAGGED.finditer(text_of(english)), start=1):
            if bool(match[1]) == server:
                found.append((f"{english}#{number}", match[2], match[3]))
    return found


def run_sample(language: str, code: str, folder: Path) -> str:
    """Run a block in `folder` with this interpreter's commands first on the PATH; its standard output."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.mark.parametrize(("name", "language", "code"), samples(server=False), ids=[s[0] for s in samples(server=False)])
def test_samples_run(name: str, language: str, code: str, smollm2_dir: Path, tmp_path: Path) -> None:
    shown = run_sample(language, code, tmp_path)
    assert shown.strip()
    if "capital of France" in code:
        assert "Paris" in shown


@pytest.fixture(scope="module")
def server_port(smollm2_dir: Path) -> Iterator[int]:
    """`bimo serve smollm2` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "BIMO_API_KEY"}
    command = [sys.executable, "-m", "bimo.cli.main", "serve", "smollm2", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("name", "language", "code"), samples(server=True), ids=[s[0] for s in samples(server=True)])
def test_samples_that_talk_to_the_server_run(
    name: str, language: str, code: str, server_port: int, tmp_path: Path
) -> None:
    if "curl" in code and not shutil.which("curl"):
        pytest.skip(f"{name} needs curl: apt-get install curl")
    assert "127.0.0.1:8000" in code
    shown = run_sample(language, code.replace("127.0.0.1:8000", f"127.0.0.1:{server_port}"), tmp_path)
    assert shown.strip()
    assert '"error"' not in shown


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    def code(name: str) -> list[tuple[str, ...]]:
        return [match.groups() for match in BLOCK.finditer(text_of(name)) if match[2] != "text"]

    def headings(name: str) -> list[str]:
        plain = re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL)
        return re.findall(r"^(#+) ", plain, flags=re.MULTILINE)

    def rows(name: str) -> int:
        return len(re.findall(r"^\|", text_of(name), flags=re.MULTILINE))

    assert code(english) == code(chinese)
    assert headings(english) == headings(chinese)
    assert rows(english) == rows(chinese)
    assert re.search("[\u4e00-\u9fff]", text_of(chinese))


def listed_files(readme: str) -> list[str]:
    """Paths in the README's tree; each line is a name, indented by two spaces a level, and what it is."""
    block = re.search(r"```text\nbimo/\n(.*?)```", text_of(readme), re.DOTALL)
    assert block is not None
    paths, folders = [], []
    for line in block[1].splitlines():
        indent, name, description = re.fullmatch(r"( +)(\S+)\s+(\S.*)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2
        assert description
        folders = [*folders[: depth - 1], name]
        paths.append("".join(folders))
    return paths


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_tree_is_complete(readme: str) -> None:
    package = ROOT / "bimo"
    listed = listed_files(readme)
    assert len(listed) == len(set(listed))
    whole = tuple(path for path in listed if path in ("web/vendor/", "web/locales/"))
    actual = {
        path
        for file in package.rglob("*")
        if file.is_file() and file.suffix in {".py", ".js", ".css", ".html", ".svg", ".json"}
        and not (path := file.relative_to(package).as_posix()).startswith(whole)
        and not (file.name == "__init__.py" and not file.stat().st_size)
    }  # fmt: skip
    assert {path for path in listed if not path.endswith("/")} == actual
    assert all((package / path).is_dir() for path in listed if path.endswith("/"))


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_other_folders_are_there(readme: str) -> None:
    """kernels/ and benchmarks/: what is listed exists, and no source of theirs is left out."""
    block = re.search(r"```text\n(kernels/.*?)```", text_of(readme), re.DOTALL)
    assert block
    listed, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else name
        listed.add(folder + name if line.startswith("  ") else name)
    assert all((ROOT / path).exists() for path in listed)
    sources = [*ROOT.glob("kernels/src/*"), *ROOT.glob("benchmarks/*.py")]
    assert {f"{file.relative_to(ROOT)}" for file in sources if file.stat().st_size} <= listed


@pytest.mark.parametrize("name", sorted({name for pair in PAIRS for name in pair}))
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(name)):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", sorted({name for pair in PAIRS for name in pair}))
def test_commands_exist(name: str) -> None:
    from typer.main import get_command

    from bimo.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    blocks = [match[3] for match in BLOCK.finditer(text_of(name)) if match[2] == "bash"]
    inline = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text_of(name)))
    code = "\n".join(blocks + inline)
    for command in re.findall(r"\bbimo ([a-z]+)\b", code):
        assert command in commands, command
    for target in re.findall(r"\bmake ([a-z]+)\b", code):
        assert target in targets, target
    every = [*commands.values(), *(c for group in commands.values() for c in getattr(group, "commands", {}).values())]
    known = {option for command in every for p in command.params for option in (*p.opts, *p.secondary_opts)}
    # pip's, curl's and torchrun's own options are not ours
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
        assert option in known | TORCHRUN | {"--debug", "--extra-index-url", "--no-deps", "--wheel-dir"}, option


def test_the_help_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for language, text in module.cli_pages().items():
        assert module.PAGES[language].read_text(encoding="utf-8") == text, "run `make docs`"


def test_make_has_the_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "run", "test", "check", "bench", "clean"):
        assert f"make {target} " in shown


def test_every_requirement_is_pinned() -> None:
    """What `make setup` and `make test` install is named in constraints.txt with one exact version."""
    import tomllib

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = [line for line in text_of("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact, and without local versions"
    pinned = {normal(line.split("==")[0]) for line in lines}
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = [entry for name in ("test", "dev", "bench") for entry in project["optional-dependencies"][name]]
    for requirement in [*project["dependencies"], *extras]:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert normal(name[0]) in pinned | {"bimo"}, requirement
