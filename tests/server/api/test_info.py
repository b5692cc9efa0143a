"""Models, health, version, metrics and the server's own description."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.api.fake import CONTEXT

NAMES = ["tiny", "tiny:auto", "tiny:exact", "tiny:routed", "tiny:full", "tiny:code", "tiny:chat"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == NAMES
    assert [client.models.retrieve(name).id for name in NAMES] == NAMES
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_model_tells_its_context(http: httpx.Client) -> None:
    assert http.get("/v1/models/tiny").json()["max_model_len"] == CONTEXT


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health(http: httpx.Client, path: str) -> None:
    assert http.get(path).json() == {"status": "ok"}


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": version("strace-llm")}


def test_errors_are_counted_by_type(http: httpx.Client) -> None:
    def count() -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        wanted = ("strace_llm_request_errors_total", {"type": "invalid_request_error"})
        return sum(sample.value for sample in samples if (sample.name, sample.labels) == wanted)

    before = count()
    http.get("/nowhere")
    http.post("/v1/chat/completions", json={})
    assert count() == before + 2


def test_description_is_exact(http: httpx.Client) -> None:
    """No framework error of its own, every error an OpenAI one, every request field typed."""
    description: dict[str, Any] = http.get("/openapi.json").json()
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            content = operation["responses"]["4XX"]["content"]["application/json"]
            assert content["schema"]["$ref"].endswith("/ErrorBody")
    schemas = description["components"]["schemas"]
    assert not {"HTTPValidationError", "ValidationError"} & schemas.keys()
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["StraceOptions"]["properties"].keys() == {
        "mode",
        "class",
        "threshold",
        "risk",
        "max_draft",
        "metrics",
    }


def test_no_pages_that_load_scripts_from_elsewhere(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404
