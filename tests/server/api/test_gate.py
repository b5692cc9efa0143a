"""The API key, the request id, and what stays open."""

from __future__ import annotations

import hmac
from collections.abc import Callable

import httpx
import pytest

from tests.server.api.fake import FakeEngine

GUARDED = ["/v1/models", "/version", "/metrics", "/openapi.json", "/v1/nonsense"]
OPEN = ["/health", "/health/live", "/health/ready"]


@pytest.fixture
def locked(connect: Callable[..., httpx.Client]) -> httpx.Client:
    return connect(FakeEngine(), api_keys=["other", "sésame"])


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer sesame", "Basic sésame", "sésame"])
def test_wrong_or_missing_key(locked: httpx.Client, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["sésame", "other"])
def test_right_key(locked: httpx.Client, key: str) -> None:
    assert locked.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_key_is_compared_in_constant_time(locked: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)))
    assert locked.get("/v1/models", headers={"Authorization": b"Bearer s"}).status_code == 401
    assert compared == [(b"s", b"other"), (b"s", "sésame".encode())]


def test_request_ids_differ(http: httpx.Client) -> None:
    ids = [http.get("/health").headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3


def test_request_id_is_the_clients_where_it_is_usable(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "job-7:a.b"}).headers["x-request-id"] == "job-7:a.b"
    for unusable in ("", "two words", "x" * 129, "é"):
        given = http.get("/health", headers={"X-Request-Id": unusable.encode()}).headers["x-request-id"]
        assert given not in ("", unusable)


def test_web_pages_of_named_origins_may_ask(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(), api_keys=["k"], cors_origins=["https://good.example"])
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
        asked = http.options("/v1/chat/completions", headers={"Origin": origin} | wanted)
        assert (asked.headers.get("access-control-allow-origin") == origin) is allowed
