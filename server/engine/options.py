"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.request import Mode


@dataclass(frozen=True)
class Options:
    """What the operator decides.

    auto: the mode that `auto` stands for where there is a draft. risk: mean divergence that `routed` may have where a
    request names neither a risk nor a threshold. max_draft: most drafts held at once. run_limit: longest run of tokens
    emitted unverified. draft_length: draw always so many drafts, unguarded (for benchmarks and certificates). chunk:
    prompt tokens per step. prefix_cache: whether texts that begin alike share blocks. seed: of the requests' own seeds
    (None: from the system).
    """

    auto: Mode = Mode.EXACT
    risk: float = 0.02
    max_draft: int = 8
    run_limit: int = 32
    draft_length: int | None = None
    chunk: int = 512
    prefix_cache: bool = True
    max_running: int = 16
    max_waiting: int = 64
    seed: int | None = None
