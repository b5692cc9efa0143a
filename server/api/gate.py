"""What every HTTP request passes first: a request id, the key, the size limit, and the net under unforeseen errors.

Plain ASGI, because Starlette's BaseHTTPMiddleware hides disconnects from the routes.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, respond
from server.metrics import Metrics

OPEN = ("/health", "/health/live", "/health/ready")
USABLE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware; puts the request id, the client's own where it sent a usable one, into
    `scope["state"]["request_id"]` and the response's X-Request-Id. Without keys everyone may ask.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_keys: Collection[str], max_body_bytes: int) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, self._bounded(scope, receive), send_with_id)
        except Exception as error:
            if started:
                raise
            await respond(error, self._metrics)(scope, receive, send_with_id)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
        given = sent.strip().encode("latin-1")
        # With every key, each in a time that does not tell how much of it was right.
        known = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "missing or wrong API key; send it as `Authorization: Bearer KEY`"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, "authentication_error", code="invalid_api_key", headers=headers)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that refuses a body over the limit, declared or not."""
        # An HTTPException, because FastAPI takes any other exception from `receive` for a parse error.
        too_large = HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise too_large
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise too_large
            return message

        return bounded
