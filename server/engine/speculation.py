"""What the rule of expected gain learns while serving, and the rule as it stands for one step.

With k drafts of cost c each and a full pass of cost v(k + 1), tokens per time are at their best when one more draft is
drawn exactly while its expected tokens exceed what its time would bring at the rate now achieved.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from server.engine.cost import CostModel
from strace.draft import GainRule, find_bin
from strace.runner import FULL

_BINS = 10
_PRIOR, _WEIGHT = 0.8, 4.0  # before anything was judged a draft is worth trying
_MEMORY = 0.99  # of a bin, per judged draft
_PACE = 0.05  # weight of one step in the rate now achieved


class Calibration:
    """Share of drafts that the full model accepts, by the draft's confidence; old evidence fades."""

    def __init__(self) -> None:
        self._accepted = [_PRIOR * _WEIGHT] * (_BINS + 1)
        self._judged = [_WEIGHT] * (_BINS + 1)

    def judge(self, confidence: float, accepted: float) -> None:
        """Learn one outcome; the last entry is over all confidences."""
        for entry in (find_bin(confidence, _BINS), _BINS):
            self._accepted[entry] = _MEMORY * self._accepted[entry] + accepted
            self._judged[entry] = _MEMORY * self._judged[entry] + 1

    @property
    def acceptance(self) -> list[float]:
        """a_hat of a draft by its confidence [bins]; one more entry, of a draft not yet drawn."""
        return list(map(operator.truediv, self._accepted, self._judged))


class Speculation:
    """The rule of expected gain, with what it learns: acceptance per graph and the rate now achieved."""

    def __init__(
        self, cost: CostModel, graphs: Iterable[str], stop_ids: Iterable[int] = (), always: bool = False
    ) -> None:
        """stop_ids: tokens that end a text, and so a draft. always: draw up to the limits, whatever it brings."""
        self.cost = cost
        self._stop_ids = sorted(stop_ids)
        self._always = always
        self.calibrations = {graph: Calibration() for graph in graphs}
        self._rate = 1.0

    def rule(self, graph: str, planned: int, batch: int) -> GainRule:
        """The rule for the drafts of one graph in this step. planned: tokens of the full pass without them. batch:
        sequences it decodes."""
        full = self.cost.seconds(FULL, batch)  # a plain step at least is to be had
        return GainRule(
            full_seconds=self.cost.table(FULL),
            draft_seconds=self.cost.table(graph),
            tokens_per_second=max(self._rate / full, 1 / (full + self.cost.own(batch, drafting=False))) * batch,
            planned=planned,
            acceptance=self.calibrations[graph].acceptance,
            stop_ids=self._stop_ids,
            always=self._always,
        )

    def paced(self, tokens: int, batch: int, seconds: float) -> None:
        """Learn from a step that decoded `batch` sequences by `tokens` together."""
        # A step holds a full pass, so it cannot have been faster than one, whatever the cost table believes.
        achieved = tokens / batch * min(self.cost.seconds(FULL, batch) / seconds, 1.0)
        self._rate += _PACE * (achieved - self._rate)
