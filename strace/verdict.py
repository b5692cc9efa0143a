"""Whether a class's best candidate is worth serving, here and elsewhere, and how that is told."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from strace.measure import predict_speedup
from strace.search import Projection
from strace.subgraph import Beside, Candidate, Manifest

WORTH = 1.05  # a predicted speedup below this is not worth a subgraph


def find_front(records: Sequence[Candidate]) -> list[bool]:
    """Which candidates no other one beats both in bytes and in predicted speedup."""
    return [
        not any(
            (o.bytes_share, -o.speedup) != (r.bytes_share, -r.speedup)
            and o.bytes_share <= r.bytes_share
            and o.speedup >= r.speedup
            for o in records
        )
        for r in records
    ]


def judge(best: Candidate, tried: Sequence[Candidate], beside: Beside | None = None) -> tuple[bool, str]:
    """Whether the best candidate shall be served, and why it or none is; a class's must surely gain `beside` pooled."""
    predicted = f"highest predicted speedup ({best.speedup:.2f}, greedy {best.greedy:.2f})"
    text = f"{best.plan.name}: {predicted} of {len(tried)} candidates"
    if best.speedup < WORTH:
        return False, f"no subgraph: {text}; below {WORTH} on this machine and runner, where it does not pay"
    if not best.plan.repaired:
        return False, f"no subgraph: {text}; the whole model in {best.plan.format} needs none"
    if beside is None:
        return True, text
    low, high = beside.interval
    over = f"{beside.gain:+.2f} ({low:+.2f} to {high:+.2f} in 95 % of draws of {beside.sources} sources) over pooled"
    if low > 0 and beside.sources > 1:  # one source drawn again is always the same
        return True, f"{text}; {over}"
    return False, f"no subgraph: {text}; {over}, which serves as well"


def tell_projected(manifest: Manifest, projection: Projection) -> str:
    """What a class's candidates, with the acceptance measured here, are predicted to bring elsewhere."""
    found = {
        record.plan.name: predict_speedup(record.accepted, projection.c(record.bytes_share), projection.v)[0]
        for record in manifest.candidates
    }
    [here] = [record.speedup for record in manifest.candidates if record.plan == manifest.plan]
    best = max(found, key=lambda name: found[name])
    return (
        f"{manifest.class_name}: {manifest.plan.name}: speedup {found[manifest.plan.name]:.2f} projected to "
        f"{projection.where}, {here:.2f} predicted here; best there: {best}, {found[best]:.2f}"
    )


def tell_candidate(record: Candidate) -> str:
    """What was measured of a candidate, in a line."""
    return (
        f"{record.plan.name}: {record.bytes_share:.3f} of the bytes, accepted {fmean(record.accepted):.3f}, "
        f"c {record.c:.2f}, predicted speedup {record.speedup:.2f} with {record.draft_length} drafts, "
        f"greedy {record.greedy:.2f}"
    )
