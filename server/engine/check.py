"""What the engine refuses before it queues a request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.blocks import BlockPool
from server.engine.request import Mode, Refused, Request


@dataclass(frozen=True)
class Limits:
    """What the model can take: tokens of prompt and continuation together, and token ids."""

    context: int
    vocabulary: int


def check(request: Request, limits: Limits, stop_ids: frozenset[int], pool: BlockPool) -> None:
    """Raises:
    Refused: naming the field at fault.
    """
    _check_ids(request, limits.vocabulary, stop_ids)
    _check_lengths(request)
    _check_risk(request)
    tokens = len(request.prompt) + request.max_tokens
    if len(request.prompt) + min(request.max_tokens, 1) > limits.context:
        raise Refused(f"the prompt has {len(request.prompt)} tokens, the model's context {limits.context}", "prompt")
    if tokens > limits.context:
        raise Refused(
            f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens}) exceed the model's context of "
            f"{limits.context} tokens",
            "max_tokens",
        )
    if not pool.fits(tokens):
        raise Refused(f"{tokens} tokens do not fit the KV cache of {pool.total} blocks", "max_tokens")


def _check_ids(request: Request, vocabulary: int, stop_ids: frozenset[int]) -> None:
    def known(ids: Iterable[int]) -> bool:
        return all(0 <= id < vocabulary for id in ids)

    if not request.prompt:
        raise Refused("the prompt is empty", "prompt")
    if not known(request.prompt):
        raise Refused(f"the prompt has token ids outside 0..{vocabulary - 1}", "prompt")
    for name, ids in (
        ("logit_bias", [id for id, _ in request.params.logit_bias]),
        ("stop_token_ids", request.stop_ids),
    ):
        if not known(ids):
            raise Refused(f"{name} has token ids outside 0..{vocabulary - 1}", name)
    if request.min_tokens and len(stop_ids.union(request.stop_ids)) >= vocabulary:
        raise Refused("min_tokens: every token would end the text", "min_tokens")


def _check_lengths(request: Request) -> None:
    if request.max_tokens < 0:
        raise Refused(f"max_tokens must not be negative, got {request.max_tokens}", "max_tokens")
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise Refused(f"min_tokens must be at most max_tokens ({request.max_tokens})", "min_tokens")
    if request.max_draft is not None and request.max_draft < 0:
        raise Refused(f"max_draft must not be negative, got {request.max_draft}", "max_draft")
    if "" in request.stop:
        raise Refused("a stop string is empty", "stop")


def _check_risk(request: Request) -> None:
    if request.risk is None:
        return
    if not 0 < request.risk < 1:
        raise Refused(f"risk must lie between 0 and 1, got {request.risk}", "risk")
    if request.threshold is not None:
        raise Refused("a threshold promises no risk; name one of the two", "risk")
    if request.mode not in (Mode.ROUTED, Mode.AUTO):
        raise Refused(f"mode {request.mode.value!r} takes no risk", "risk")
