"""Which gate a `routed` request goes through: a threshold of its own, or the one that is certified for its risk.

A certificate speaks of requests like those it was measured on: sampled at its temperatures and in no other way
unusual, of prompts that the classifier sends to the class. Every other request is served `exact`, and told why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from server.engine.request import Request
from strace.certificate import Certificate
from strace.sampling import SamplingParams

_FREE = frozenset(
    {"id", "prompt", "params", "max_tokens", "mode", "class_name", "threshold", "risk", "max_draft", "specials"}
)
"""Fields of a request that cannot raise its divergence, or are looked at on their own."""


@dataclass(frozen=True)
class Gate:
    """Which tokens of a text are emitted unverified: those of at least `threshold` confidence among its first `tokens`.

    risk: the mean divergence promised, if one is, by this certificate. shut: why none is emitted, where some were asked
    for.
    """

    threshold: float = math.inf
    tokens: float = math.inf
    risk: float | None = None
    shut: str | None = None
    certificate: Certificate | None = None


class Promises:
    """The certificates in force, by class."""

    def __init__(self, certificates: Mapping[str, Certificate], risk: float) -> None:
        """risk: of requests that name none."""
        self._certificates, self._risk = certificates, risk

    def open(self, request: Request, class_name: str, choose: Callable[[list[int]], str]) -> Gate:
        """The gate of a request that shall run `routed` with the subgraph of `class_name`. choose: the class of a
        prompt."""
        if request.logprobs is not None:
            return Gate(shut="log-probabilities are the full model's, known only once it has seen a token")
        if request.grammar is not None:
            return Gate(shut="structured output is verified: what is emitted cannot be taken back")
        if request.threshold is not None:
            return Gate(request.threshold)
        certificate = self._certificates.get(class_name)
        if certificate is None:
            return Gate(shut=f"nothing is certified for class {class_name!r}")
        if why := find_unusual(request, certificate.tokens):
            return Gate(shut=f"not certified: {why}")
        if request.class_name is not None and (own := choose(request.prompt)) != class_name:
            return Gate(shut=f"not certified: the request names class {class_name!r}, its prompt is of {own!r}")
        temperature = request.params.temperature
        if temperature not in certificate.temperatures:
            known = ", ".join(f"{t:g}" for t in certificate.temperatures) or "none"
            return Gate(shut=f"not certified: temperature {temperature:g} (for class {class_name!r}: {known})")
        risk = self._risk if request.risk is None else request.risk
        level = certificate.find(temperature, risk)
        if level is None or level.threshold is None:
            return Gate(shut=f"not certified: a risk of {risk:g} for class {class_name!r}")
        # The last token of a measured text was always the full model's. What follows it here is verified, and only
        # lowers the share that diverges.
        return Gate(level.threshold, certificate.tokens - 1, level.risk, certificate=certificate)

    def stands(self, gate: Gate, class_name: str) -> bool:
        """Whether what a gate was opened by is still in force."""
        return gate.certificate == self._certificates.get(class_name)


def find_unusual(request: Request, tokens: int) -> str | None:
    """What sets a request apart from those that were measured, on texts of up to so many tokens; None if nothing does.

    A text that is cut shorter than those was not measured: its first tokens may diverge more than the average one.
    """
    if request.max_tokens < tokens:
        return f"max_tokens below {tokens}"
    greedy = request.params.temperature == 0
    # A greedy text is the same whatever its seed; a seed couples a drawn one to the full model's.
    plain = SamplingParams(request.params.temperature, seed=request.params.seed if greedy else None)
    usual = Request(request.id, request.prompt, request.params, request.max_tokens)
    unlike = [f.name for f in fields(plain) if getattr(request.params, f.name) != getattr(plain, f.name)]
    unlike += [
        f.name for f in fields(usual) if f.name not in _FREE and getattr(request, f.name) != getattr(usual, f.name)
    ]
    return ", ".join(unlike) or None
