"""Whether `routed` keeps its promise: per class, a test by betting on the divergence of every finished request.

The unit is a finished routed request, its loss the divergent share of its tokens, the claim under test that the mean
loss, given all requests before, is at most the promised risk. Money is bet against the claim: a stake b becomes
b * loss / risk, which no claim that holds lets grow on average. What the money has become, the evidence, is an
e-process (Waudby-Smith and Ramdas, arXiv:2010.09686; monitoring of risks, arXiv:2506.16416): if the claim holds, the
evidence *ever* reaches 1/alpha with a probability of at most alpha (Ville).

Old good requests must not hide drift, so the bets are restarted at every request, as in CUSUM. The usual sum or maximum
of restarted e-processes (e-detectors, arXiv:2203.03532) only bounds the average run length to a false alarm, by
1/alpha: a false alarm comes for sure. Here the money for all restarts is one unit, of which request t releases
1/(t(t+1)), so the sum is an e-process itself and a false alarm in all time stays below alpha. The price is delay: the
evidence that a drift after t good requests needs is larger by a factor of about t^2 over the requests it lasts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

logger = logging.getLogger(__name__)
ALPHA = 0.05
_BETS = 2.0 ** -np.arange(6)  # shares of the money that are bet, side by side: no one share suits every drift


class Evidence:
    """Money bet at fair odds or worse, one unit in all; with arrays for gains, so many streams side by side."""

    def __init__(self) -> None:
        self.seen = 0
        self._bet: np.ndarray = np.zeros(len(_BETS))

    def observe(self, gain: float | np.ndarray) -> None:
        """gain: per unit of a bet, at least -1; its mean is at most 0 where the claim under test holds."""
        self.seen += 1
        released = 1 / (self.seen * (self.seen + 1))
        self._bet = (self._bet + released) * (1 + np.multiply.outer(gain, _BETS))

    @property
    def value(self) -> np.ndarray:
        """float64, one per stream: what was bet, and what was not released yet."""
        return self._bet.mean(-1) + 1 / (self.seen + 1)


def judge_breach(evidence: Evidence, loss: float | np.ndarray, risk: float) -> None:
    """Bet against a mean loss of at most `risk`; losses lie in 0..1."""
    evidence.observe(loss / risk - 1)


def judge_recovery(evidence: Evidence, loss: float | np.ndarray, risk: float) -> None:
    """Bet against a mean loss of at least `risk`; losses lie in 0..1."""
    evidence.observe((risk - loss) / (1 - risk))


@dataclass
class Audit:
    """One class: the evidence against it or, while it is tripped, for its recovery. trips: how often it tripped."""

    evidence: Evidence = field(default_factory=Evidence)
    reason: str | None = None
    trips: int = 0

    def turn(self, reason: str | None) -> None:
        """Trip for a reason, or re-arm; either way the evidence starts anew."""
        self.reason, self.evidence = reason, Evidence()
        self.trips += reason is not None


class Auditor:
    """The audits of all classes.

    A class that never breaks its promise trips with probability at most `alpha` after each arming. While it is tripped
    its requests run `exact` and the gate in shadow: what it would have emitted, and whether that was divergent. The
    k-th recovery is believed at 2^k / alpha, so one that stays in breach is ever re-armed with probability at most
    `alpha`. A restart re-arms too.
    """

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha
        self._audits: dict[str, Audit] = {}

    def tripped(self, name: str) -> str | None:
        """Why requests of a class may not be routed, if so. From any thread."""
        audit = self._audits.get(name)
        return None if audit is None else audit.reason

    def observe(self, name: str, loss: float, risk: float) -> None:
        """Learn from a finished routed request; what was routed before the class tripped tells nothing new."""
        audit = self._audits.setdefault(name, Audit())
        if audit.reason is not None:
            return
        judge_breach(audit.evidence, loss, risk)
        if audit.evidence.value >= 1 / self.alpha:
            seen = audit.evidence.seen
            audit.turn(f"the auditor tripped: class {name!r} diverged by more than the promised {risk:.1%}")
            logger.warning("%s, seen in %d requests; it is served exact", audit.reason, seen)

    def observe_shadow(self, name: str, loss: float, risk: float) -> None:
        """Learn from a request that would have been routed were its class not tripped."""
        audit = self._audits[name]
        if audit.reason is None:
            return
        judge_recovery(audit.evidence, loss, risk)
        if audit.evidence.value >= 2**audit.trips / self.alpha:
            logger.warning("class %r kept below %.1f%% in %d requests in shadow; it is routed again",
                           name, 100 * risk, audit.evidence.seen)  # fmt: skip
            audit.turn(None)

    def states(self) -> dict[str, tuple[bool, float]]:
        """Per class: is it tripped, and the evidence of the running test as a share of what decides it. From any
        thread."""
        return {
            name: (audit.reason is not None, float(audit.evidence.value) * self.alpha / self._factor(audit))
            for name, audit in list(self._audits.items())
        }

    @staticmethod
    def _factor(audit: Audit) -> float:
        return 1.0 if audit.reason is None else 2.0**audit.trips
