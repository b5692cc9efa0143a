"""What the full model's rows make of a step's drafts: the emitted ones are audited, the held ones kept or replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.request import Mode
from server.engine.sequence import Draft, Sequence
from strace.sampling import draw_token, process, total_variation, verify


def settle(sequence: Sequence, logits: Tensor) -> list[tuple[float, float]]:
    """Bring a text to its next fully verified state.

    logits: the full model's, float32 [n + 1, V], before each of the step's n drafts and after the last. At least one
    token is added: the full model's own. Everything behind a token that ends the text is discarded.

    Returns per draft that the full model judged its confidence and the share of it that was accepted, 0 to 1.
    """
    draft, first = sequence.draft, len(sequence.ids) - sequence.draft.emitted
    p = process(logits, sequence.histories(range(len(draft.tokens) + 1)), sequence.request.params)
    sequence.draft = Draft()
    shares = [1 - divergence for divergence in _audit(sequence, draft, p, first)]
    held = draft.held
    q = torch.stack(draft.rows[draft.emitted :]) if held else p[:0]
    tokens = verify(p[draft.emitted :], q, held, sequence.noise, len(sequence.ids))
    accepted = len(tokens) - 1
    shares += [1.0] * accepted + [0.0] * (accepted < len(held))
    _account(sequence, draft, accepted)
    for i, token in enumerate(tokens):
        sequence.append(token, drafted=i < accepted)
        if sequence.finish:
            break
    # Accepted drafts went through the pass as they stand; the last token, or what cut the text, need not have.
    sequence.verified = len(sequence.ids) - 1
    return list(zip(draft.confidence, shares, strict=False))


def _audit(sequence: Sequence, draft: Draft, p: Tensor, first: int) -> list[float]:
    """Per emitted token, and counted: was it other than the full model's choice after the same text?

    Without a seed a draw has no counterpart to compare with; its expected divergence, the total variation, stands for
    it.
    """
    divergences = []
    for i, token in enumerate(draft.tokens[: draft.emitted]):
        if sequence.noise.shared:
            divergences.append(float(draw_token(p[i], sequence.noise, first + i) != token))
        else:
            divergences.append(float(total_variation(p[i], draft.rows[i])))
    sequence.ran.divergent += sum(divergences)
    return divergences


def _account(sequence: Sequence, draft: Draft, accepted: int) -> None:
    if not draft.tokens:
        return
    ran, standing = sequence.ran, draft.emitted + accepted
    ran.drafts += 1
    ran.drafted += len(draft.tokens)
    ran.accepted += standing
    ran.accepted_at += [0] * (standing - len(ran.accepted_at))
    for i in range(standing):
        ran.accepted_at[i] += 1
    unsure = ran.mode == Mode.ROUTED and bool(draft.held)
    ran.fallbacks += int(unsure or standing < len(draft.tokens))
