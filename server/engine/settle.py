"""What the full model's rows make of a step's drafts: the emitted ones are audited, the held ones kept or replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.engine.logprobs import read_logprobs
from server.engine.request import Mode
from server.engine.sequence import Sequence
from strace.draft import Draft, Held
from strace.runner import Runner
from strace.sampling import Sampler, total_variation


@dataclass(slots=True)
class Settling:
    """A text between the full pass and the verdict on what it holds.

    shares: of each emitted draft, how much the full model would have accepted. raw: its rows before they were shaped,
    if log-probabilities are asked for. unseen: divergence of what the gate would have emitted.
    """

    draft: Draft
    shares: list[float]
    raw: Tensor | None
    unseen: list[float]
    held: Held


def hold(sequence: Sequence, row: int) -> Settling:
    """What `audit` gives of a text that emitted nothing and tells nothing, for which no logits are needed."""
    draft = sequence.draft
    return Settling(draft, [], None, [], Held(row, draft.tokens, draft.q, sequence.sampler))


def audit(sequence: Sequence, logits: Tensor, row: int, runner: Runner) -> Settling:
    """Compare what was emitted with the full model's choices, and leave what is held to `Runner.verify`.

    logits: the full model's, float32 [R, V]; from `row` on those before each of the step's drafts and after the last.
    What was emitted has its rows overwritten.
    """
    draft, emitted, sampler = sequence.draft, sequence.emitted, sequence.sampler
    first, end = row + emitted, row + len(draft.tokens) + 1
    raw = None if sequence.request.logprobs is None else logits[first:end].clone()
    unseen = [] if sequence.shadow is None else _watch_gate(sequence, draft, logits[row:end].clone(), runner)
    if not emitted:
        return Settling(draft, [], raw, unseen, Held(first, draft.tokens, draft.q, sampler))
    divergences = _diverge(draft, emitted, logits[row:first], sampler.before(emitted), runner)
    sequence.ran.divergent += sum(divergences)
    q = None if draft.q is None else draft.q[emitted:]
    held = Held(first, draft.tokens[emitted:], q, sampler)
    return Settling(draft, [1 - divergence for divergence in divergences], raw, unseen, held)


def settle(sequence: Sequence, settling: Settling, tokens: list[int]) -> list[tuple[float, float]]:
    """Bring a text to its next fully verified state.

    tokens: those held that stand, and one of the full model's own. Everything behind a token that ends the text is
    discarded.

    Returns per draft that the full model judged its confidence and the share of it that was accepted, 0 to 1.
    """
    if sequence.request.max_tokens == 0:
        sequence.finish, sequence.verified = "length", len(sequence.ids) - 1
        return []
    accepted = len(tokens) - 1
    judged = _account(sequence, settling, accepted) if settling.draft.tokens else []
    logprobs = None if settling.raw is None else read_logprobs(settling.raw, tokens, sequence.request.logprobs or 0)
    for i, token in enumerate(tokens):
        sequence.append(token, i < accepted, None if logprobs is None else logprobs[i])
        if sequence.finish:
            break
    # Accepted drafts went through the pass as they stand; the last token, or what cut the text, need not have.
    sequence.verified = len(sequence.ids) - 1
    return judged


def _diverge(draft: Draft, count: int, logits: Tensor, sampler: Sampler, runner: Runner) -> list[float]:
    """Per token of the first `count` of a draft: is it other than the full model's choice after the same text?

    Without a seed a draw has no counterpart to compare with; its expected divergence, the total variation, stands for
    it. sampler: of the first draft. logits: float32 [>= count, V], overwritten.
    """
    tokens = draft.tokens[:count]
    if not tokens:
        return []
    if draft.q is None or sampler.noise.shared:
        chosen = runner.verify(logits, [Held(i, [], None, sampler.after(tokens[:i])) for i in range(count)])
        return [float(token != choice) for token, (choice,) in zip(tokens, chosen, strict=True)]
    p = runner.process(logits[:count], tokens[:-1], sampler)
    divergences: list[float] = total_variation(p, draft.q[:count]).tolist()
    return divergences


def _watch_gate(sequence: Sequence, draft: Draft, logits: Tensor, runner: Runner) -> list[float]:
    """`_diverge` of the drafts that `routed` would have emitted, were it allowed."""
    drawn = zip(draft.tokens, draft.confidence, strict=True)
    sure = [confidence >= sequence.threshold and token not in sequence.stop_ids for token, confidence in drawn]
    count = sure.index(False) if False in sure else len(sure)
    return _diverge(draft, count, logits, sequence.sampler, runner)


def _account(sequence: Sequence, settling: Settling, accepted: int) -> list[tuple[float, float]]:
    """Book a draft, of which nothing is left; gives what `settle` does. accepted: of what was held."""
    draft, held, emitted = settling.draft, settling.held.tokens, len(settling.shares)
    sequence.clear_draft()
    if sequence.shadow is not None:
        sequence.shadow.judged += min(accepted + 1, len(held))
        sequence.shadow.divergent += sum(settling.unseen[: accepted + 1])
    ran, standing = sequence.ran, emitted + accepted
    ran.drafts += 1
    ran.drafted += len(draft.tokens)
    ran.accepted += standing
    ran.accepted_at += [0] * (standing - len(ran.accepted_at))
    for i in range(standing):
        ran.accepted_at[i] += 1
    unsure = ran.mode == Mode.ROUTED and emitted < len(draft.tokens)
    ran.fallbacks += int(unsure or standing < len(draft.tokens))
    shares = settling.shares + [1.0] * accepted + [0.0] * (accepted < len(held))
    return list(zip(draft.confidence, shares, strict=False))
