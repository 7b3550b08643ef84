"""Recipes: what is written is read back, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bimo.errors import UsageError
from bimo.recipe import load_recipe, save_recipe

SMALL = 'name = "诗"\n[[data.sources]]\nname = "a"\npath = "texts"\n'.replace("诗", "poems")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(SMALL, encoding="utf-8")
    return file


def test_a_resolved_recipe_reads_back_as_itself(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["training.curriculum=[[0.5, 64], [0.5, 128]]", 'report.questions=["你好，“笔墨”？", "a \\"quote\\""]',
                 'data.sources.0.text="{word}：{meaning}"', "training.learning_rate=1e-4"]  # fmt: skip
    recipe = load_recipe(recipe_file, overrides)
    (tmp_path / "elsewhere").mkdir()
    save_recipe(recipe, tmp_path / "elsewhere" / "resolved.toml")
    assert load_recipe(tmp_path / "elsewhere" / "resolved.toml") == recipe
    assert recipe.report.questions[0] == "你好，“笔墨”？"


def test_paths_are_from_the_recipes_folder(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.clean.toxic_words=['words.txt']"])
    assert recipe.data.sources[0].path == str(tmp_path / "texts")
    assert recipe.data.clean.toxic_words == (str(tmp_path / "words.txt"),)
    package = load_recipe(recipe_file, ["data.sources.0.path=npm:@scope/x@1.0"])
    assert package.data.sources[0].path == "npm:@scope/x@1.0"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.step=3", "there is no key training.step; did you mean steps?"),
        ("data.sources.0.pth=x", "data.sources.0.pth; did you mean path?"),
        ("data.clean.qality=true", "did you mean quality?"),
        ("training.steps=0", "training.steps"),
        ("training.learning_rate=nan", "training.learning_rate"),
        ("model.hidden_size=385", "hidden_size"),
        ("model.num_kv_heads=5", "num_kv_heads"),
        ("training.curriculum=[[0.5, 64]]", "sum to 1"),
        ("data.sources.0.prompt={q}", "both prompt and answer"),
        ("data.sources.3.path=x", "there is no '3'"),
        ("name=../../etc", "name"),
        ("nonsense", "key=value"),
        ("#x=1", "there is no key #x"),
    ],
)
def test_mistakes_are_named(recipe_file: Path, override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_sources_of_one_name_are_refused(recipe_file: Path) -> None:
    recipe_file.write_text(SMALL + '[[data.sources]]\nname = "a"\npath = "b"\n', encoding="utf-8")
    with pytest.raises(UsageError, match="two sources are called a"):
        load_recipe(recipe_file)


@pytest.mark.parametrize("content", [b"", b"name = ", b"\xff\xfe\x00", b"[data]\n"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.toml"):
        load_recipe(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "missing.toml")


def test_files_of_other_encodings_and_keys_of_other_letters(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(file).name == "poems"
    file.write_bytes(SMALL.encode() + "# 中文\n".encode("gbk"))
    with pytest.raises(UsageError, match=r"line \d+: expected UTF-8, got the byte 0xd6; save it as UTF-8"):
        load_recipe(file)
    file.write_text(SMALL + "[compare.variants]\n方案 = []\n", encoding="utf-8")
    with pytest.raises(UsageError, match='keys of other letters than a-z stand in quotes: "方案" = '):
        load_recipe(file)
    file.write_text(SMALL + '[[stage]]\nbase = "smollm2"\n[[stage.task]]\nname = "a"\npath = "a"\n', encoding="utf-8")
    wishes = ['compare.variants."v1.5"=["stage.0.length=64"]', "compare.variants.方案=[]"]
    compare = load_recipe(file, wishes).compare
    assert compare is not None and list(compare.variants) == ["v1.5", "方案"]


def test_the_shipped_recipes_are_valid() -> None:
    for file in (Path(__file__).parents[1] / "recipes").glob("*.toml"):
        assert load_recipe(file).name == file.stem
