"""`strace-llm serve`: listen, load, say where, run until told to stop."""

from __future__ import annotations

import json
import shlex
import signal
import socket
from contextlib import ExitStack
from importlib.metadata import version

import uvicorn

from server.api.generation import DRAIN_SECONDS
from server.api.served import Served
from server.app import create_app
from server.config import ServeConfig
from server.load import load_served

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then let requests in progress finish for a while.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: see `load_served` and `ServeConfig.api_keys`.
    """
    # Before the model is loaded, which may take minutes.
    with listen(config.host, config.port) as listener:
        keys = config.api_keys()
        served = load_served(config)
        app = create_app(served, keys, config.max_body_bytes, config.cors_origins)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=DRAIN_SECONDS + 1,
                ssl_certfile=config.tls_certificate,
                ssl_keyfile=config.tls_key,
            )
        )
        print(describe(served, config, listener.getsockname()[1]), flush=True)
        # uvicorn raises a signal again once it has shut down cleanly; by then there is nothing left to interrupt.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])


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
        f"classes {', '.join(served.classes) or 'none'}, context {served.context} tokens",
        f"API at {url}/v1, metrics at {url}/metrics",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ]
    if config.host in ANYWHERE and not locked:
        lines.append("warning: reachable from other machines, and no --api-key is set")
    return "\n".join(lines)
