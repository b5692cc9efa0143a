"""The API key, the request id, and what stays open."""

from __future__ import annotations

import hmac
from collections.abc import Callable

import httpx
import pytest

from tests.server.api.fake import FakeEngine

GUARDED = ["/v1/models", "/version", "/openapi.json", "/v1/nonsense"]
OPEN = ["/health", "/health/live", "/health/ready", "/metrics"]


@pytest.fixture
def locked(connect: Callable[..., httpx.Client]) -> httpx.Client:
    return connect(FakeEngine(), api_key="sésame")


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer sesame", "Basic sésame", "sésame"])
def test_wrong_or_missing_key(locked: httpx.Client, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_right_key(locked: httpx.Client) -> None:
    assert locked.get("/v1/models", headers={"Authorization": "Bearer sésame".encode()}).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_key_is_compared_in_constant_time(locked: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)))
    assert locked.get("/v1/models", headers={"Authorization": b"Bearer s"}).status_code == 401
    assert compared == [(b"s", "sésame".encode())]


def test_request_ids_differ(http: httpx.Client) -> None:
    ids = [http.get("/health").headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
