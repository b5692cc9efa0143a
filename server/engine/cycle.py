"""A step's passes: drafts where they pay, one full-model pass over everything, and what its rows make of the drafts.

It knows the runner and what speculation learns; which texts run, and on which blocks, the scheduler has said.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from server.engine.cost import CostModel
from server.engine.guard import Guard, Key, Turn
from server.engine.options import Options
from server.engine.request import Mode, Refused
from server.engine.scheduler import Plan
from server.engine.sequence import Sequence
from server.engine.settle import audit, settle
from server.engine.speculation import Speculation
from strace.draft import DraftLimits, DraftPlan, GainRule, count_alive
from strace.kv import Batch
from strace.runner import FULL, Runner

logger = logging.getLogger(__name__)
PROBE = 4  # drafts of a probe


@dataclass
class Rows:
    """What a full pass gave: logits float32 [R, V], and which of them each text goes on from; none inside a prompt."""

    logits: Tensor
    spans: dict[Sequence, range]

    def read_prompt(self, sequence: Sequence) -> None:
        """Let a text take its prompt's log-probabilities; the row that its next token follows from is left."""
        span = self.spans.pop(sequence)
        if left := sequence.read_prompt(self.logits[span.start : span.stop]):
            self.spans[sequence] = span[-left:]


class Spent:
    """What a step has taken of the runner: seconds, and passes by graph."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: dict[str, int] = {}

    def add(self, begun: float, graph: str | None = None, passes: int = 1) -> float:
        """Book a call that began at `begun` and has just ended; its seconds."""
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        if graph is not None:
            self.passes[graph] = self.passes.get(graph, 0) + passes
        return seconds


class Cycle:
    """What all steps share."""

    def __init__(
        self, runner: Runner, cost: CostModel, speculation: Speculation, guard: Guard, options: Options
    ) -> None:
        self.runner, self.cost, self.speculation, self.guard = runner, cost, speculation, guard
        self._options = options
        self._longest = max(options.max_draft, options.run_limit)
        self._turn = Turn(0)
        self.spent = Spent()

    def draft(self, plan: Plan) -> None:
        """Draw drafts, batched per subgraph, where the guard lets them and they pay, and book them."""
        self.spent = Spent()
        keys = {_key(s) for s in plan.decoding if s.ran.mode != Mode.FULL}
        self._turn = turn = self.guard.turn(keys, len(plan.decoding), measurable=not plan.chunks)
        planned = len(plan.decoding) + sum(plan.chunks.values())
        by_graph: dict[str, list[Sequence]] = {}
        for sequence in plan.decoding:
            if sequence.ran.mode != Mode.FULL and turn.allows(_key(sequence)):
                by_graph.setdefault(sequence.ran.class_name, []).append(sequence)
        for graph, sequences in by_graph.items():
            rule = self.speculation.rule(graph, planned, len(plan.decoding))
            if not (turn.probe or rule.pays(1.0, len(sequences), 0, self._longest)):
                continue  # before the texts are looked at: where drafts do not pay nothing else shall cost either
            rule, limits = self._choose_drafting(graph, rule, {s: s.limits(self._options) for s in sequences})
            if limits:
                drafting = DraftPlan([s.sampler() for s in limits], list(limits.values()), rule)
                planned += self._draft_with(graph, drafting, list(limits))

    def _choose_drafting(
        self, graph: str, rule: GainRule, limits: dict[Sequence, DraftLimits]
    ) -> tuple[GainRule, dict[Sequence, DraftLimits]]:
        """The sequences of one graph that shall draw, and the rule they draw by. Where none does and the guard probes,
        all of them do: several drafts each, because the cost of a lone one would be mostly that of the call."""
        able = {s: limit for s, limit in limits.items() if limit.left() > 0}
        pays = {most: rule.pays(1.0, len(able), 0, most) for most in {limit.left() for limit in able.values()}}
        paying = {s: limit for s, limit in able.items() if pays[limit.left()]}
        if paying or not able or not self._turn.probe:
            return rule, paying
        self._turn.forced.add(graph)
        probing = {
            s: replace(limit, held=min(PROBE, limit.held), emitted=min(PROBE, limit.emitted))
            for s, limit in able.items()
        }
        return replace(rule, always=True), probing

    def _draft_with(self, graph: str, plan: DraftPlan, sequences: list[Sequence]) -> int:
        """Draw and book the drafts of one graph; how many tokens they add to the full pass."""
        batch, begun = _batch({s: s.ids[s.verified :] for s in sequences}), time.perf_counter()
        drafts = self.runner.draft(graph, batch, plan)
        alive = count_alive(drafts)
        self._turn.drafting[graph] = seconds = self.spent.add(begun, graph, len(alive))
        if alive:  # a grammar may leave a short head nothing to draw
            self.cost.observe(graph, alive, seconds)
        for sequence, draft in zip(sequences, drafts, strict=True):
            self._turn.drafted[_key(sequence)] += len(draft.tokens)
            sequence.book(draft)
        return sum(alive)

    def full_pass(self, plan: Plan) -> Rows:
        """One full-model pass over everything."""
        tokens = {s: s.ids[s.verified :] + s.held for s in plan.decoding}
        wanted = {s: len(block) for s, block in tokens.items()}
        for sequence, count in plan.chunks.items():
            tokens[sequence] = sequence.ids[sequence.verified : sequence.verified + count]
            wanted[sequence] = count if sequence.reads_prompt else int(sequence.verified + count == len(sequence.ids))
        rows: list[int] = []
        spans: dict[Sequence, range] = {}
        end = 0
        for sequence, block in tokens.items():
            end += len(block)
            if count := wanted[sequence]:
                spans[sequence] = range(len(rows), len(rows) + count)
                rows += range(end - count, end)
        batch, begun = _batch(tokens), time.perf_counter()
        logits = self.runner.forward(FULL, batch, rows)
        self.spent.add(begun, FULL)
        return Rows(logits, spans)

    def settle(self, rows: Rows, plan: Plan) -> dict[Sequence, Exception]:
        """Bring every text to its next verified state; those that could not be, and why."""
        for sequence, count in plan.chunks.items():
            if sequence.reads_prompt:
                rows.read_prompt(sequence)
            sequence.verified += count
        settling = {s: audit(s, rows.logits, span.start, self.runner) for s, span in rows.spans.items()}
        held, begun = [each.held for each in settling.values()], time.perf_counter()
        verdicts = self.runner.verify(rows.logits, held)
        self.spent.add(begun)
        failed: dict[Sequence, Exception] = {}
        for (sequence, each), tokens in zip(settling.items(), verdicts, strict=True):
            try:
                judged = settle(sequence, each, tokens)
            except Refused as error:
                failed[sequence] = error
                continue
            except Exception as error:
                logger.exception("request %s failed", sequence.request.id)
                failed[sequence] = error
                continue
            for confidence, share in judged:
                self.speculation.calibrations[sequence.ran.class_name].judge(confidence, share)
        return failed

    def account(self, before: dict[Sequence, int], seconds: float, plain: bool) -> None:
        """Book the time of a step that read no prompts, and what the full model would have needed for its tokens.

        before: tokens of each text before the step. A plain step, without drafts, is what the full model needs: no
        estimate is asked.
        """
        full_step = seconds if plain else self.guard.full_step(len(before)) or self.cost.seconds(FULL, len(before))
        for sequence, tokens in before.items():
            sequence.ran.seconds += seconds
            sequence.ran.full_seconds += (sequence.ran.tokens - tokens) * full_step
        drafting = sum(self._turn.drafting.values())
        if FULL in self.spent.passes:
            rows = len(before) + self._turn.drafted.total()
            self.cost.observe(FULL, [rows], self.spent.seconds - drafting)
            self.cost.observe_own(len(before), drafting > 0, seconds - self.spent.seconds)
        added = sum(s.ran.tokens - n for s, n in before.items())
        self.speculation.paced(added, len(before), seconds)
        gained = Counter[Key]()
        for sequence, tokens in before.items():
            gained[_key(sequence)] += max(sequence.ran.tokens - tokens - 1, 0)
        self.guard.book(self._turn, seconds, gained)


def _key(sequence: Sequence) -> Key:
    """What a text is judged by."""
    return sequence.ran.mode, sequence.ran.class_name


def _batch(tokens: dict[Sequence, list[int]]) -> Batch:
    """One pass over each sequence's next tokens, from its first unverified position on."""
    joined = torch.from_numpy(np.array([token for block in tokens.values() for token in block], dtype=np.int64))
    tables = torch.stack([s.table for s in tokens])
    return Batch(joined, [len(block) for block in tokens.values()], [s.verified for s in tokens], tables)
