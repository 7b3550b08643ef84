"""What a base writes itself: the same for the same seed, and never an error because a question fills its context."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bimo
from bimo.data.records import Message
from bimo.training import replay
from bimo.training.replay import rehearse


def silent(label: str, done: int, total: int) -> None:
    pass


def test_the_same_texts_for_the_same_seed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Without a chat template it goes on from the beginning of a text."""
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with bimo.load(str(base)) as model:
        first, again, other = (
            [document.text for document in rehearse(model, samples=16, max_tokens=3, seed=seed, progress=silent)]
            for seed in (0, 0, 1)
        )
    assert first == again != other
    assert 0 < len(first) == len(set(first))


def test_questions_that_fill_the_context_are_passed_over(tiny_model_dir: Path) -> None:
    """A base with a short context may write a question that leaves no room for an answer."""
    with bimo.load(str(tiny_model_dir), context_length=32) as model:
        questions = ["short", "far too long 太长了 " * 40]
        answered = list(replay._answered(model, questions, 4))
        assert all(turns[0] == Message("user", "short") for turns in answered)
        assert list(replay._answered(model, [], 4)) == []
