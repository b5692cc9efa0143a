"""The metrics' names are a contract with the dashboard; their values follow the engine's accounts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from prometheus_client import generate_latest

from server.engine.auditor import Auditor
from server.engine.guard import Guard
from server.engine.observer import Step
from server.engine.request import Mode, Ran
from server.engine.sequence import Times
from server.metrics import Metrics, metric_names

P = "strace_llm_"
COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": (),
    "prefix_tokens": ("outcome",),
    "preemptions": (),
    "generation_tokens": ("mode", "class"),
    "requests": ("mode", "class", "finish_reason"),
    "request_errors": ("type",),
    "spec_decode_num_drafts": ("class",),
    "spec_decode_num_draft_tokens": ("class",),
    "spec_decode_num_accepted_tokens": ("class",),
    "spec_decode_num_accepted_tokens_per_pos": ("class", "position"),
    "fallbacks": ("class",),
    "unverified_tokens": ("class",),
    "divergent_tokens": ("class",),
    "decode_seconds": ("mode", "class"),
    "decode_full_equivalent_seconds": ("mode", "class"),
    "step_seconds": ("part",),
    "passes": ("graph",),
}
STEP = Step(0.1, 1, 0, 1, 0.075, {"full": 1, "code": 4})
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
]
GAUGES = ["requests_running", "requests_waiting", "kv_cache_usage_ratio", "info"]
VERDICTS = [
    "guard_state",
    "guard_speedup_ratio",
    "gate_state",
    "gate_speedup_ratio",
    "guard_baseline_age_seconds",
    "auditor_tripped",
]
GAUGES += [*VERDICTS, "auditor_evidence_ratio"]
RAN = Ran(
    Mode.ROUTED,
    "code",
    prompt_tokens=7,
    tokens=10,
    drafts=3,
    drafted=9,
    accepted=6,
    accepted_at=[3, 2, 1],
    fallbacks=2,
    unverified=4,
    divergent=0.5,
    seconds=0.25,
    full_seconds=0.5,
    cached_tokens=5,
    preemptions=2,
)
TIMES = Times(submitted=10.0, admitted=10.5, updates=[11.0, 11.25, 12.0], finished=12.0)


@dataclass(frozen=True)
class Now:
    running: int = 2
    waiting: int = 3
    blocks_used: int = 1
    blocks_total: int = 4


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The value of one sample; None if there is none."""
    return metrics.registry.get_sample_value(P + name, labels)


def judges() -> tuple[Guard, Auditor]:
    """A guard that saw eight texts decoded twice as fast by drafts, and one of a routed class; an auditor that saw one
    tripped class."""
    guard, auditor = Guard(np.ones(9)), Auditor()
    key = (Mode.EXACT, "code")
    for _ in range(100):
        turn = guard.turn([key], 8, measurable=True)
        if turn.allows(key):
            turn.drafted[key], turn.drafting["code"] = 8, 0.1
        guard.book(turn, 1.0, Counter({key: 8 * turn.allows(key)}))
    guard.turn([(Mode.ROUTED, "math")], 1, measurable=True)
    for _ in range(20):
        auditor.observe("code", 1.0, 0.02)
    return guard, auditor


def test_names() -> None:
    expected = {f"{P}{name}_total" for name in COUNTERS} | {P + name for name in GAUGES}
    expected |= {f"{P}{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    assert metric_names() == expected


def test_everything_exposed_is_named() -> None:
    """`metric_names` hides nothing that a scrape shows but the creation times of the Prometheus client."""
    metrics = Metrics()
    metrics.on_finish(RAN, TIMES, "stop")
    metrics.on_step(STEP)
    metrics.errors.labels("server_error").inc()
    metrics.info.labels("1", "m", "bf16", "cpu").set(1)
    metrics.watch_judges(*judges())
    shown = {s.name for family in metrics.registry.collect() for s in family.samples if not s.name.endswith("_created")}
    assert shown == metric_names()


def test_finished_request_is_counted() -> None:
    metrics = Metrics()
    metrics.on_finish(RAN, TIMES, "length")
    both = {"mode": "routed", "class": "code"}
    assert value(metrics, "requests_total", **both, finish_reason="length") == 1
    assert value(metrics, "prompt_tokens_total") == 7
    assert [value(metrics, "prefix_tokens_total", outcome=outcome) for outcome in ("hit", "miss")] == [5, 2]
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "generation_tokens_total", **both) == 10
    assert value(metrics, "decode_seconds_total", **both) == 0.25
    assert value(metrics, "decode_full_equivalent_seconds_total", **both) == 0.5
    by_class = {
        "spec_decode_num_drafts": 3,
        "spec_decode_num_draft_tokens": 9,
        "spec_decode_num_accepted_tokens": 6,
        "fallbacks": 2,
        "unverified_tokens": 4,
        "divergent_tokens": 0.5,
    }
    assert {name: value(metrics, f"{name}_total", **{"class": "code"}) for name in by_class} == by_class
    for position, count in enumerate([3, 2, 1]):
        labels = {"class": "code", "position": str(position)}
        assert value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", **labels) == count


def test_times() -> None:
    metrics = Metrics()
    metrics.on_finish(RAN, TIMES, "stop")
    sums = {name: (value(metrics, f"{name}_sum"), value(metrics, f"{name}_count")) for name in HISTOGRAMS}
    assert sums == {
        "time_to_first_token_seconds": (1.0, 1),
        "inter_token_latency_seconds": (1.0, 2),
        "e2e_request_latency_seconds": (2.0, 1),
        "request_queue_time_seconds": (0.5, 1),
    }


def test_request_cancelled_while_it_waited() -> None:
    metrics = Metrics()
    metrics.on_finish(Ran(Mode.EXACT, "pooled", 3), Times(1.0, finished=2.0), "cancelled")
    assert value(metrics, "requests_total", mode="exact", finish_reason="cancelled", **{"class": "pooled"}) == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 0
    assert value(metrics, "request_queue_time_seconds_count") == 0
    assert value(metrics, "prefix_tokens_total", outcome="miss") is None


def test_gauges_follow_the_engine() -> None:
    metrics = Metrics()
    metrics.watch(Now)
    shown = [value(metrics, name) for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio")]
    assert shown == [2, 3, 0.25]


def test_verdicts_are_shown() -> None:
    metrics = Metrics()
    metrics.watch_judges(*judges())
    labels = {"mode": "exact", "class": "code", "batch": "8"}
    assert value(metrics, "guard_state", **labels) == 1
    assert value(metrics, "guard_speedup_ratio", **labels) == pytest.approx(2)
    assert 0 <= (value(metrics, "guard_baseline_age_seconds", batch="8") or 0) < 60
    assert value(metrics, "auditor_tripped", **{"class": "code"}) == 1
    assert 0 < (value(metrics, "auditor_evidence_ratio", **{"class": "code"}) or 0) < 1


def test_two_servers_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.on_step(STEP)
    assert value(one, "step_seconds_total", part="runner") == 0.075
    assert value(one, "step_seconds_total", part="engine") == pytest.approx(0.025)
    assert value(one, "passes_total", graph="code") == 4
    one.on_finish(RAN, TIMES, "stop")
    assert value(other, "prompt_tokens_total") == 0
    assert b"strace_llm_prompt_tokens_total 7.0" in generate_latest(one.registry)


@pytest.mark.parametrize(("name", "labels"), COUNTERS.items())
def test_labels(name: str, labels: tuple[str, ...]) -> None:
    metrics = Metrics()
    metrics.on_finish(RAN, TIMES, "stop")
    metrics.on_step(STEP)
    metrics.errors.labels("server_error").inc()
    (family,) = (f for f in metrics.registry.collect() if f.name == P + name)
    counted = [set(s.labels) for s in family.samples if s.name.endswith("_total")]
    assert counted
    assert all(found == set(labels) for found in counted)
