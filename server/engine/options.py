"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.request import Mode


@dataclass(frozen=True)
class Options:
    """What the operator decides.

    auto: the mode that `auto` stands for where there is a draft. threshold: least confidence of a token emitted
    unverified. max_draft: most drafts held at once. run_limit: longest run of tokens emitted unverified. draft_length:
    draw always so many drafts (for benchmarks). chunk: prompt tokens per step. prefix_cache: whether texts that begin
    alike share blocks. seed: of the requests' own seeds (None: from the system).
    """

    auto: Mode = Mode.EXACT
    threshold: float = 0.9
    max_draft: int = 8
    run_limit: int = 32
    draft_length: int | None = None
    chunk: int = 512
    prefix_cache: bool = True
    max_running: int = 16
    max_waiting: int = 64
    seed: int | None = None
