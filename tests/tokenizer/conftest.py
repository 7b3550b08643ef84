"""Tokenizers of both kinds, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bimo.tokenizer.load import Tokenizer
from tests.tokenizer.tiny import byte_level_metadata, load, sentencepiece_metadata


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_metadata(), tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(sentencepiece_metadata(), tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(smollm2_dir)
