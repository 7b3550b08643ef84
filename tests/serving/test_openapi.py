"""The server against its own /openapi.json, with requests made by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.failures import Failure

from bimo.backends.embedding import Embedder
from bimo.backends.local import LocalBackend
from bimo.serving.app import create_app
from tests.encoders import make_encoder

# A schema cannot say that a text must fit the context, that top_logprobs needs logprobs, or which JSON schemas the
# grammar compiler knows; a well-formed request may be refused for these reasons, and for no others.
REASONS = {"context_length_exceeded", "unsupported_combination", "invalid_value", "missing_required_parameter"}


@schemathesis.check
def well_formed_is_understood(ctx, response, case) -> None:
    """Stands in for positive_data_acceptance: 400 to a well-formed request needs a reason outside the schema."""
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        if error["code"] not in REASONS or " should " in error["message"]:  # "should be less than": pydantic's words
            raise Failure(operation=case.operation.label, title="a well-formed request was refused", message=str(error))


app = create_app(None, model_name="tiny")
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
# 413: a list longer than allowed may make a body larger than allowed
schema.config.checks.negative_data_rejection.expected_statuses.append("413")


@pytest.fixture(scope="module", autouse=True)
def short_context(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model that soon has no room left, since most requests say nothing about max_tokens; and an encoder."""
    encoder = make_encoder(tmp_path_factory.mktemp("encoder") / "encoder")
    with (
        LocalBackend.load(str(tiny_model_dir), dtype="float32", context_length=32, kv_cache_tokens=4096) as backend,
        Embedder.load(str(encoder)) as embedder,
    ):
        app.state.service.attach(backend, embedder)
        yield


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_own_schema(case) -> None:
    case.call_and_validate(excluded_checks=[schemathesis.checks.CHECKS.get_one("positive_data_acceptance")])
