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


def prepare(sequence: Sequence, logits: Tensor, row: int) -> Settling:
    """A text's drafts as the full model shall judge them: what was emitted is audited, what is held is settled.

    logits: the full model's, float32 [R, V]; from `row` on those before each of the step's drafts and after the last.
    """
    draft, emitted = sequence.take_draft()
    raw = None
    if sequence.request.logprobs is not None:
        raw = logits[row + emitted : row + len(draft.tokens) + 1].clone()
    audited = emitted if sequence.shadow is None else _count_sure(sequence, draft)
    held = Held(row, draft.tokens, draft.q, sequence.sampler(back=emitted), emitted, audited)
    return Settling(draft, held, raw)


def settle(sequence: Sequence, settling: Settling, verdict: Verdict) -> list[tuple[float, float]]:
    """Bring a text to its next fully verified state. Everything behind a token that ends the text is discarded.

    Returns per draft that the full model judged its confidence and the share of it that was accepted, 0 to 1.
    """
    if sequence.request.max_tokens == 0:
        sequence.finish, sequence.verified = "length", len(sequence.ids) - 1
        return []
    draft, emitted = settling.draft, settling.held.emitted
    tokens, divergences = verdict.tokens[emitted:], verdict.divergences
    held, accepted = len(draft.tokens) - emitted, len(tokens) - 1
    shares = [1 - divergence for divergence in divergences[:emitted]] + [1.0] * accepted + [0.0] * (accepted < held)
    if sequence.shadow is None:
        sequence.ran.divergent += sum(divergences)
    else:
        sequence.shadow.judged += min(accepted + 1, held)
        sequence.shadow.divergent += sum(divergences)
    _account(sequence, draft, emitted, accepted)
    count, raw = sequence.request.logprobs, settling.raw
    logprobs = [None] * len(tokens) if raw is None else read_logprobs(raw, tokens, count or 0)
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        sequence.append(token, drafted=i < accepted, logprob=logprob)
        if sequence.finish:
            break
    # Accepted drafts went through the pass as they stand; the last token, or what cut the text, need not have.
    sequence.verified = len(sequence.ids) - 1
    return list(zip(draft.confidence, shares, strict=False))


def _count_sure(sequence: Sequence, draft: Draft) -> int:
    """How many drafts `routed` would have emitted, were it allowed."""
    drawn = zip(draft.tokens, draft.confidence, strict=True)
    sure = [confidence >= sequence.threshold and token not in sequence.stop_ids for token, confidence in drawn]
    return sure.index(False) if False in sure else len(sure)


def _account(sequence: Sequence, draft: Draft, emitted: int, accepted: int) -> None:
    if not draft.tokens:
        return
    ran, standing = sequence.ran, emitted + accepted
    ran.drafts += 1
    ran.drafted += len(draft.tokens)
    ran.accepted += standing
    ran.accepted_at += [0] * (standing - len(ran.accepted_at))
    for i in range(standing):
        ran.accepted_at[i] += 1
    unsure = ran.mode == Mode.ROUTED and emitted < len(draft.tokens)
    ran.fallbacks += int(unsure or standing < len(draft.tokens))
