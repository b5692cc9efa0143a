"""`strace-llm serve`: listen, load, say where, run until told to stop."""

from __future__ import annotations

import json
import shlex
import socket
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import uvicorn
from fastapi import FastAPI

from server.api.generation import SEND_SECONDS
from server.api.served import Served
from server.app import create_app
from server.config import ServeConfig
from server.engine.engine import Engine
from server.life import Server
from server.load import load_served
from strace.memory import keep_less

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then let requests in progress finish for a while. SIGHUP reads the subgraphs
    again. Without its engine the process exits with status 1.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: see `load_served` and `ServeConfig.api_keys`.
    """
    keep_less()
    # Before the model is loaded, which may take minutes.
    with listen(config.host, config.port) as listener:
        keys = config.api_keys()
        served = load_served(config)
        app = create_app(served, keys, config.max_body_bytes, config.cors_origins)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SEND_SECONDS + 1,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
        )
        assert isinstance(served.engine, Engine)
        server = Server(settings, served.engine, config.drain_timeout, config.step_timeout, partial(reload, app))
        print(describe(served, config, listener.getsockname()[1]), flush=True)
        server.live([listener])


def reload(app: FastAPI) -> str:
    """Read the subgraphs of the app's model again; what there is then. Raises what `Served.reload` does."""
    served: Served = app.state.served
    assert served.reload is not None
    app.state.served = replace(served, classes=served.reload())
    return f"subgraphs read again: classes {', '.join(app.state.served.classes)}"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        OSError: saying which address and why.
    """
    with ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        undo.pop_all()
    return listener


def describe(served: Served, config: ServeConfig, port: int) -> str:
    """What is served, where, and a request to try."""
    host = ANYWHERE.get(config.host, config.host)
    scheme = "http" if config.tls_key is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    body = json.dumps({"model": served.name, "messages": [{"role": "user", "content": "Hello"}]})
    locked = config.api_key is not None or config.api_key_file is not None
    key = "" if not locked else ' -H "Authorization: Bearer $STRACE_LLM_API_KEY"'
    lines = [
        f"strace-llm {version('strace-llm')} serves {served.name} on {config.device}: mode {served.mode.value}, "
        f"classes {', '.join(served.classes) or 'none'}, context {served.context} tokens, "
        f"KV cache {served.cache} tokens",
        f"API at {url}/v1, metrics at {url}/metrics",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ]
    if config.host in ANYWHERE and not locked:
        lines.append("warning: reachable from other machines, and no --api-key is set")
    return "\n".join(lines)
