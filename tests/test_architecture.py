"""The shape of the code: levels, sizes, names, what may import torch, who may read the environment. `ast` only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bimo"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
LEVELS = {
    **dict.fromkeys(["errors", "runtime"], 0),
    **dict.fromkeys(["tokenizer", "models", "recipe", "quant", "registries"], 1),
    **dict.fromkeys(["data", "adapters", "engine", "formats"], 2),
    **dict.fromkeys(["objectives", "backends"], 3),
    **dict.fromkeys(["training", "tasks", "assistant"], 4),
    **dict.fromkeys(["evaluation", "serving", "web"], 5),
    "cli": 6,
}
# The package's lazy front. It hands out the facade of backends/, so importing it counts as importing that.
FRONT, FRONT_LEVEL = "__init__", LEVELS["backends"]


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(file: Path) -> str:
    """The folder, or for a file directly in the package its own name."""
    relative = file.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(file: Path, *, at_start: bool = False) -> Iterator[str]:
    """Dotted names that a file imports: all of them, or only those run when the file is imported."""
    pending: list[ast.AST] = [tree_of(file)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if at_start and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node)
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    if part == FRONT:
        return
    assert part in LEVELS, f"{part} has no level: add it to LEVELS"
    for name in imports_of(file):
        package, _, rest = name.partition(".")
        if package != "bimo":
            continue
        target = rest.split(".")[0]
        level = LEVELS.get(target, FRONT_LEVEL)
        both_at_the_root = level == LEVELS[part] == 0
        assert target == part or level < LEVELS[part] or both_at_the_root, (
            f"{name_of(file)} (level {LEVELS[part]}) imports {name} (level {level})"
        )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short_and_well_named(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert file.stem not in {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("file", [file for file in FILES if file.stat().st_size], ids=name_of)
def test_files_say_what_they_are_and_what_is_public(file: Path) -> None:
    tree = tree_of(file)
    assert ast.get_docstring(tree), f"{name_of(file)} has no docstring"
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets)
    ]
    assert len(lists) == 1, f"{name_of(file)} should have one __all__"
    public = ast.literal_eval(lists[0])
    defined = {"__version__"} if part_of(file) == FRONT else set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert set(public) <= defined, f"{name_of(file)}: __all__ names what is not there"
    assert len(public) == len(set(public))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_runtime_reads_the_environment(file: Path) -> None:
    if name_of(file) == "runtime.py":
        return
    for node in ast.walk(tree_of(file)):
        spelled = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        assert spelled not in {"os.environ", "os.getenv", "os.putenv", "environ", "getenv"}, name_of(file)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}, name_of(file)


@pytest.mark.parametrize("name", ["engine/scheduler.py", "engine/request.py", "engine/sequence.py"])
def test_scheduling_needs_no_torch(name: str) -> None:
    assert not [imported for imported in imports_of(PACKAGE / name) if imported.split(".")[0] == "torch"]


def test_the_core_imports_no_reference_library() -> None:
    references = {"transformers", "peft", "trl", "llama_cpp", "openvino_genai", "ctranslate2", "vllm", "openai"}
    for file in FILES:
        found = {imported.split(".")[0] for imported in imports_of(file)} & references
        assert not found, f"{name_of(file)} imports {found}"


def test_no_pickle() -> None:
    for file in FILES:
        assert not {name.split(".")[0] for name in imports_of(file)} & {"pickle", "cloudpickle", "dill"}, name_of(file)


HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "huggingface_hub", "numpy", "tokenizers")
LIGHT = {
    "bimo": HEAVY,
    "bimo.cli.main": HEAVY,
    "bimo.formats.hub": HEAVY,
    "bimo.engine.engine": ("torch",),
    "bimo.backends.facade": ("torch", "numpy", "jinja2"),  # the tokenizer is read beside these imports
    "bimo.backends.build": ("torch",),
}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_costs_no_torch(module: str) -> None:
    script = f"import sys, {module}; print(*[name for name in {LIGHT[module]} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


def test_public_names_exist() -> None:
    import bimo

    assert set(dir(bimo)) == set(bimo.__all__)
    for name in bimo.__all__:
        assert getattr(bimo, name) is not None
    with pytest.raises(AttributeError):
        bimo.no_such_name  # noqa: B018


def test_every_package_needed_is_declared() -> None:
    """What bimo imports is the standard library, a dependency, or an optional package imported in a function."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {entry.split(">")[0].split("[")[0].strip().lower().replace("-", "_") for entry in project["dependencies"]}
    declared = needed | {"starlette", "pydantic_core"}  # what fastapi and pydantic are made of
    for file in FILES:
        for name in imports_of(file, at_start=True):
            top = name.split(".")[0]
            assert top in declared or top in sys.stdlib_module_names or top == "bimo", f"{name_of(file)} imports {top}"
