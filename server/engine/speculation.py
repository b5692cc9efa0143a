"""How many drafts to draw: the drafter that the runner calls, and the rule of expected gain behind it.

With k drafts of cost c each and a full pass of cost v(k + 1), tokens per time are at their best when one more draft is
drawn exactly while its expected tokens exceed what its time would bring at the rate now achieved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from server.engine.cost import CostModel
from server.engine.options import Options
from server.engine.sequence import Sequence
from strace.runner import FULL, Drawn
from strace.sampling import draw_draft, process

_BINS = 10
_PRIOR, _WEIGHT = 0.8, 4.0  # before anything was judged a draft is worth trying
_MEMORY = 0.99  # of a bin, per judged draft
_PACE = 0.05  # weight of one step in the rate now achieved
_PROBE = 32  # every so many refusals to draft at all, one draft is drawn nevertheless


class Calibration:
    """Share of drafts that the full model accepts, by the draft's confidence; old evidence fades."""

    def __init__(self) -> None:
        self._accepted = [_PRIOR * _WEIGHT] * (_BINS + 1)
        self._judged = [_WEIGHT] * (_BINS + 1)

    def judge(self, confidence: float, accepted: float) -> None:
        """Learn one outcome; the last entry is over all confidences."""
        for entry in (_bin(confidence), _BINS):
            self._accepted[entry] = _MEMORY * self._accepted[entry] + accepted
            self._judged[entry] = _MEMORY * self._judged[entry] + 1

    def acceptance(self, confidence: float | None = None) -> float:
        """a_hat of a draft of this confidence, or of one not yet drawn."""
        entry = _BINS if confidence is None else _bin(confidence)
        return self._accepted[entry] / self._judged[entry]


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)


class Speculation:
    """The rule of expected gain, with what it learns: acceptance per graph and the rate now achieved."""

    def __init__(self, cost: CostModel, graphs: Iterable[str]) -> None:
        self.cost = cost
        self.calibrations = {graph: Calibration() for graph in graphs}
        self._refusals = 0
        self._rate = 1.0

    def pays(self, graph: str, survival: float, alive: int, planned: int, batch: int, most: int) -> bool:
        """Whether a sequence shall draw another draft.

        survival: probability that all its drafts so far stand. alive: sequences that share the draft step. planned:
        tokens of the full pass as it stands. batch: sequences it decodes. most: drafts the sequence may still draw.
        Looks ahead over all of these, because a kernel's jump from one token to two must not hide that eight would pay.
        """
        full_step = self.cost.seconds(FULL, batch)
        tokens_per_second = max(self._rate, 1.0) * batch / full_step
        step, verified = self.cost.seconds(graph, alive) / alive, self.cost.seconds(FULL, planned)
        acceptance = self.calibrations[graph].acceptance()
        gain = 0.0
        for n in range(1, most + 1):
            survival *= acceptance
            gain += survival
            if gain >= tokens_per_second * (n * step + self.cost.seconds(FULL, planned + n) - verified):
                return True
        return False

    def probes(self) -> bool:
        """Called on each refusal to draft at all; now and then True, so that a pessimistic table can recover."""
        self._refusals += 1
        return self._refusals % _PROBE == 0

    def paced(self, tokens: int, batch: int, seconds: float) -> None:
        """Learn from a step that decoded `batch` sequences by `tokens` together."""
        # A step holds a full pass, so it cannot have been faster than one, whatever the cost table believes.
        achieved = tokens / batch * min(self.cost.seconds(FULL, batch) / seconds, 1.0)
        self._rate += _PACE * (achieved - self._rate)


class StepDrafter:
    """The drafts of one step for the sequences of one graph: the runner's `Drafter`.

    Whether another token is drawn may depend on all drawn before; whether one is emitted or held reads the draft's
    confidence, known before the draw, and whether it ends the text. A drawn token is never withdrawn.
    """

    def __init__(
        self,
        speculation: Speculation,
        graph: str,
        sequences: list[Sequence],
        planned: int,
        batch: int,
        options: Options,
    ) -> None:
        """planned: tokens of the full pass before any draft. batch: sequences it decodes."""
        self._speculation, self._graph = speculation, graph
        self._planned, self._batch = planned, batch
        self._options = options
        self.alive_at: list[int] = []
        self.sequences = [s for s in sequences if self._starts(s, len(sequences))]

    @property
    def planned(self) -> int:
        """Tokens of the full pass with the drafts drawn so far."""
        return self._planned + sum(self.alive_at)

    def draw(self, rows: Tensor, confidence: list[float], alive: list[int]) -> Drawn:
        self.alive_at.append(len(alive))
        tokens, drawn_from = [], []
        for row, sure, i in zip(rows, confidence, alive, strict=True):
            sequence = self.sequences[i]
            drawn = len(sequence.draft.tokens)
            q = process(row[None], sequence.histories(range(drawn, drawn + 1)), sequence.request.params)[0]
            token = draw_draft(q, sequence.noise, sequence.length)
            if sequence.may_emit(token, sure):
                sequence.emit(token, q, sure)
            else:
                sequence.hold(token, q, sure, self._speculation.calibrations[self._graph].acceptance(sure))
            tokens.append(token)
            drawn_from.append(q)
        return Drawn(tokens, torch.stack(drawn_from), confidence)

    def survivors(self, alive: list[int]) -> list[int]:
        return [i for i in alive if self._goes_on(self.sequences[i], len(alive))]

    def _starts(self, sequence: Sequence, alive: int) -> bool:
        most = self._most(sequence)
        return most > 0 and (self._wants(sequence, alive, most) or self._speculation.probes())

    def _goes_on(self, sequence: Sequence, alive: int) -> bool:
        ended = sequence.draft.tokens[-1] in sequence.stop_ids
        most = self._most(sequence)
        return not ended and most > 0 and self._wants(sequence, alive, most)

    def _wants(self, sequence: Sequence, alive: int, most: int) -> bool:
        if self._options.draft_length is not None:
            return True
        survival = sequence.draft.survival
        return self._speculation.pays(self._graph, survival, alive, self.planned, self._batch, most)

    def _most(self, sequence: Sequence) -> int:
        """How many more drafts the limits allow."""
        draft, asked = sequence.draft, sequence.request.max_draft
        limit = self._options.run_limit if sequence.emitting else self._options.max_draft
        if self._options.draft_length is not None:
            limit = min(self._options.draft_length, limit)
        if asked is not None:
            limit = min(asked, limit)
        return min(limit - (draft.emitted if sequence.emitting else len(draft.held)), sequence.room)
