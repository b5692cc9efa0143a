"""What the full model's rows make of a step's drafts: the emitted ones are audited, the held ones kept or replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.engine.logprobs import read_logprobs
from server.engine.request import Mode
from server.engine.sequence import Sequence
from strace.draft import Draft, Held, Verdict


@dataclass(slots=True)
class Settling:
    """A text between the full pass and the verdict on its drafts. raw: its rows before they were shaped, if
    log-probabilities are asked for."""

    draft: Draft
    held: Held
    raw: Tensor | None


def prepare(sequence: Sequence, row: int, logits: Tensor | None = None) -> Settling:
    """A text's drafts as the full model shall judge them: what was emitted is audited, what is held is settled.

    row: of the full model's logits, the one before the first draft. logits: float32 [R, V], where log-probabilities are
    asked for.
    """
    draft, emitted, sampler = sequence.draft, sequence.emitted, sequence.sampler
    raw = None
    if logits is not None and sequence.request.logprobs is not None:
        raw = logits[row + emitted : row + len(draft.tokens) + 1].clone()
    audited = emitted if sequence.shadow is None else _count_sure(sequence, draft)
    first = sampler.before(emitted) if emitted else sampler
    return Settling(draft, Held(row, draft.tokens, draft.q, first, emitted, audited), raw)


def settle(sequence: Sequence, settling: Settling, verdict: Verdict) -> list[tuple[float, float]]:
    """Bring a text to its next fully verified state. Everything behind a token that ends the text is discarded.

    Returns per draft that the full model judged its confidence and the share of it that was accepted, 0 to 1.
    """
    if sequence.request.max_tokens == 0:
        sequence.finish, sequence.verified = "length", len(sequence.ids) - 1
        return []
    tokens = verdict.tokens[settling.held.emitted :]
    accepted = len(tokens) - 1
    judged = _account(sequence, settling, accepted, verdict.divergences) if settling.draft.tokens else []
    logprobs = None if settling.raw is None else read_logprobs(settling.raw, tokens, sequence.request.logprobs or 0)
    for i, token in enumerate(tokens):
        sequence.append(token, i < accepted, None if logprobs is None else logprobs[i])
        if sequence.finish:
            break
    # Accepted drafts went through the pass as they stand; the last token, or what cut the text, need not have.
    sequence.verified = len(sequence.ids) - 1
    return judged


def _count_sure(sequence: Sequence, draft: Draft) -> int:
    """How many drafts `routed` would have emitted, were it allowed."""
    drawn = zip(draft.tokens, draft.confidence, strict=True)
    sure = [confidence >= sequence.threshold and token not in sequence.stop_ids for token, confidence in drawn]
    return sure.index(False) if False in sure else len(sure)


def _account(
    sequence: Sequence, settling: Settling, accepted: int, divergences: list[float]
) -> list[tuple[float, float]]:
    """Book a draft, of which nothing is left; gives what `settle` does. accepted: of what was held."""
    draft, emitted = settling.draft, settling.held.emitted
    held, ran, standing = len(draft.tokens) - emitted, sequence.ran, emitted + accepted
    sequence.clear_draft()
    if sequence.shadow is None:
        ran.divergent += sum(divergences)
    else:
        sequence.shadow.judged += min(accepted + 1, held)
        sequence.shadow.divergent += sum(divergences)
    ran.drafts += 1
    ran.drafted += len(draft.tokens)
    ran.accepted += standing
    ran.accepted_at += [0] * (standing - len(ran.accepted_at))
    for i in range(standing):
        ran.accepted_at[i] += 1
    unsure = ran.mode == Mode.ROUTED and emitted < len(draft.tokens)
    ran.fallbacks += int(unsure or standing < len(draft.tokens))
    shares = [1 - divergence for divergence in divergences[:emitted]] + [1.0] * accepted + [0.0] * (accepted < held)
    return list(zip(draft.confidence, shares, strict=False))
