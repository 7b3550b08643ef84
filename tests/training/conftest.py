"""The texts that the trainings of these tests read."""

from __future__ import annotations

import pytest

from bimo.training.session import Texts
from tests.training.tiny import make_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return make_texts(tmp_path_factory.mktemp("texts"))
