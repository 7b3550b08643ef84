"""The texts that the trainings of these tests read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bimo.training.session import Texts
from tests.training.tiny import make_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is only slowed by a second one, fifty times where another process is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
