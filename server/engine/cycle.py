"""A step's passes: drafts where they pay, one full-model pass over everything, and what its rows make of the drafts.

It knows the runner and what speculation learns; which texts run, and on which blocks, the scheduler has said.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from server.engine.cost import CostModel
from server.engine.guard import Guard, Key, Turn
from server.engine.options import Options
from server.engine.request import Mode, Refused
from server.engine.scheduler import Plan
from server.engine.sequence import Sequence
from server.engine.settle import Settling, prepare, settle
from server.engine.speculation import Speculation
from strace.draft import DraftLimits, DraftPlan, GainRule, Verdict, count_alive
from strace.kv import Batch
from strace.runner import FULL, Runner

logger = logging.getLogger(__name__)
PROBE = 4  # drafts of a probe


@dataclass
class Passed:
    """What a full pass gave the texts that go on from it; none that is still inside its prompt.

    spans: which rows are each one's. Where somebody has to look at them: logits, float32 [R, V]; else settling and the
    verdicts on what is held.
    """

    spans: dict[Sequence, range]
    logits: Tensor | None = None
    settling: list[Settling] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def read_prompt(self, sequence: Sequence) -> None:
        """Let a text take its prompt's log-probabilities; the row that its next token follows from is left."""
        assert self.logits is not None
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


class Tables:
    """The tables of a batch's texts in one tensor, put together anew only where one of them is another."""

    def __init__(self) -> None:
        self._known: list[np.ndarray] = []
        self._joined = torch.empty(0, 0, dtype=torch.int64)

    def join(self, tables: list[np.ndarray]) -> Tensor:
        """int64 [S, B]."""
        if list(map(id, tables)) != list(map(id, self._known)):
            self._known, self._joined = tables, torch.from_numpy(np.stack(tables))
        return self._joined


class Gathering:
    """A pass in the making: of each text its next tokens, from the first unverified position on, and which rows are
    wanted of it; those of a text are its `spans`."""

    def __init__(self) -> None:
        self.spans: dict[Sequence, range] = {}
        self.rows: list[int] = []
        self._tokens: list[int] = []
        self._counts: list[int] = []
        self._starts: list[int] = []
        self._tables: list[np.ndarray] = []

    def add(self, sequence: Sequence, tokens: list[int], wanted: int) -> None:
        """Add a text, of whose tokens the last `wanted` want rows."""
        self._tokens += tokens
        self._counts.append(len(tokens))
        self._starts.append(sequence.verified)
        self._tables.append(sequence.table)
        if wanted:
            first, end = len(self.rows), len(self._tokens)
            self.spans[sequence] = range(first, first + wanted)
            self.rows += range(end - wanted, end)

    def join(self, tables: Tables) -> Batch:
        """The pass. tables: of the graph that it is of."""
        return Batch(self._tokens, self._counts, self._starts, tables.join(self._tables))


class Cycle:
    """What all steps share."""

    def __init__(
        self, runner: Runner, cost: CostModel, speculation: Speculation, guard: Guard, options: Options
    ) -> None:
        self.runner, self.cost, self.speculation, self.guard = runner, cost, speculation, guard
        self._options = options
        self._longest = max(options.max_draft, options.run_limit)
        self._turn = Turn(0)
        self._keys: dict[Sequence, Key] = {}
        self._tables = defaultdict[str, Tables](Tables)
        self.spent = Spent()

    def draft(self, plan: Plan) -> None:
        """Draw drafts, batched per subgraph, where the guard lets them and they pay, and book them."""
        self.spent = Spent()
        able = {s: _key(s) for s in plan.decoding if s.ran.mode != Mode.FULL}
        self._turn = turn = self.guard.turn(able.values(), len(plan.decoding), measurable=not plan.chunks)
        self._keys = {s: turn.runs(key) for s, key in able.items()}
        planned = len(plan.decoding) + sum(plan.chunks.values())
        by_graph: dict[str, list[Sequence]] = {}
        for sequence, key in self._keys.items():
            if key != able[sequence]:
                sequence.ran.bypass = self.guard.why_shut(turn, key[1]) or sequence.ran.bypass
            if turn.allows(key):
                by_graph.setdefault(key[1], []).append(sequence)
        for graph, sequences in by_graph.items():
            rule = self.speculation.rule(graph, planned, len(plan.decoding))
            if not (turn.probe or rule.pays(1.0, len(sequences), 0, self._longest)):
                continue  # before the texts are looked at: where drafts do not pay nothing else shall cost either
            limits = {s: s.limits(self._options, shut=self._is_shut(s)) for s in sequences}
            rule, limits = self._choose_drafting(graph, rule, limits)
            if limits:
                plan_of_graph = DraftPlan([s.sampler for s in limits], list(limits.values()), rule)
                planned += self._draft_with(graph, plan_of_graph, list(limits))

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
        gathering = Gathering()
        for sequence in sequences:
            gathering.add(sequence, sequence.pending, 1)
        batch, begun = gathering.join(self._tables[graph]), time.perf_counter()
        drafts = self.runner.draft(graph, batch, plan)
        alive = count_alive(drafts)
        self._turn.drafting[graph] = seconds = self.spent.add(begun, graph, len(alive))
        if alive:  # a grammar may leave a short head nothing to draw
            self.cost.observe(graph, alive, seconds)
        for sequence, draft in zip(sequences, drafts, strict=True):
            self._turn.drafted[self._keys[sequence]] += len(draft.tokens)
            sequence.book(draft, shut=self._is_shut(sequence))
        return sum(alive)

    def _is_shut(self, sequence: Sequence) -> bool:
        """Whether this step verifies all that it drafts for a text."""
        return self._keys[sequence][0] is not Mode.ROUTED

    def full_pass(self, plan: Plan) -> Passed:
        """One full-model pass over everything, and where nobody has to see its rows, the verdicts on what is held."""
        gathering = Gathering()
        for sequence in plan.decoding:
            gathering.add(sequence, sequence.pending, 1 + len(sequence.draft.tokens))
        for sequence, count in plan.chunks.items():
            end = sequence.verified + count
            wanted = count if sequence.reads_prompt else int(end == len(sequence.ids))
            gathering.add(sequence, sequence.ids[sequence.verified : end], wanted)
        batch, rows, spans = gathering.join(self._tables[FULL]), gathering.rows, gathering.spans
        if any(s.reads_rows for s in spans):
            begun = time.perf_counter()
            passed = Passed(spans, self.runner.forward(FULL, batch, rows))
        else:
            settling = [prepare(s, span.start) for s, span in spans.items()]
            held, begun = [each.held for each in settling], time.perf_counter()
            passed = Passed(spans, None, settling, self.runner.verify_pass(batch, rows, held))
        self.spent.add(begun, FULL)
        return passed

    def settle(self, passed: Passed, plan: Plan) -> dict[Sequence, Exception]:
        """Bring every text to its next verified state; those that could not be, and why."""
        for sequence, count in plan.chunks.items():
            if sequence.reads_prompt:
                passed.read_prompt(sequence)
            sequence.verified += count
        if passed.logits is not None:
            passed.settling = [prepare(s, span.start, passed.logits) for s, span in passed.spans.items()]
            held, begun = [each.held for each in passed.settling], time.perf_counter()
            passed.verdicts = self.runner.verify(passed.logits, held)
            self.spent.add(begun)
        failed: dict[Sequence, Exception] = {}
        for sequence, each, verdict in zip(passed.spans, passed.settling, passed.verdicts, strict=True):
            try:
                judged = settle(sequence, each, verdict)
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
        added, gained = 0, Counter[Key]()
        for sequence, tokens in before.items():
            ran = sequence.ran
            new = ran.tokens - tokens
            ran.seconds += seconds
            ran.full_seconds += new * full_step
            added += new
            if new > 1 and (key := self._keys.get(sequence)) is not None:
                gained[key] += new - 1
        drafting = sum(self._turn.drafting.values())
        if FULL in self.spent.passes:
            rows = len(before) + self._turn.drafted.total()
            self.cost.observe(FULL, [rows], self.spent.seconds - drafting)
            self.cost.observe_own(len(before), drafting > 0, seconds - self.spent.seconds)
        self.speculation.paced(added, len(before), seconds)
        self.guard.book(self._turn, seconds, gained)


def _key(sequence: Sequence) -> Key:
    """What a text is judged by; one that may emit nothing is drafted for as in `exact`."""
    return Mode.ROUTED if sequence.emits else Mode.EXACT, sequence.ran.class_name
