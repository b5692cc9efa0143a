"""The server keeps to its own description: schemathesis makes requests from /openapi.json and checks every answer."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup

NAMES = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/v1/models/{id}",
    "/tokenize",
    "/detokenize",
    "/health/ready",
    "/version",
    "/metrics",
]


@pytest.fixture(scope="module")
def description(address: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{address}/openapi.json").json())


def test_every_path_is_tried(description: schemathesis.BaseSchema) -> None:
    assert {operation.ok().path for operation in description.get_all_operations()} == {
        *PATHS,
        "/health",
        "/health/live",
    }


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_described(description: schemathesis.BaseSchema, address: str, path: str) -> None:
    operation = next(found.ok() for found in description.get_all_operations() if found.ok().path == path)
    checks = [CHECKS.get_one(name) for name in NAMES]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # or every answer would be a 404
        case.call_and_validate(base_url=address, checks=checks)

    check()


def test_a_wrong_answer_is_seen(address: str) -> None:
    raw = httpx.get(f"{address}/openapi.json").json()
    raw["components"]["schemas"]["Version"]["properties"]["version"]["type"] = "integer"
    schema = schemathesis.openapi.from_dict(raw)
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().path == "/version")

    @settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        with pytest.raises(FailureGroup):
            case.call_and_validate(base_url=address, checks=[CHECKS.get_one("response_schema_conformance")])

    check()
