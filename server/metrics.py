"""Prometheus metrics of the server, on a registry of their own.

Counters follow vLLM's names after the prefix; realised speedup over any span is the ratio of the rates of
`strace_llm_decode_full_equivalent_seconds_total` and `strace_llm_decode_seconds_total`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.engine.auditor import Auditor
from server.engine.guard import Guard
from server.engine.observer import Step
from server.engine.request import Ran
from server.engine.sequence import Times


class Stats(Protocol):
    """The engine at one moment, as `Engine.stats` gives it."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def blocks_used(self) -> int: ...

    @property
    def blocks_total(self) -> int: ...


PREFIX = "strace_llm"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
# Seconds. Steps of small models take milliseconds, prompts of large ones minutes.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


class Judges(Collector):
    """Gauges of the guard's and the auditor's verdicts, read whenever they are scraped."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.auditor: Auditor | None = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ("mode", "class", "batch")
        state = _family("guard_state", "1: drafts, 0: served by plain full steps, 0.5: not sure yet", *labels)
        speedup = _family("guard_speedup_ratio", "Realised speedup in paired blocks, older ones fading", *labels)
        gate = _family(
            "gate_state", "1: routed emits unverified, 0: it verifies all, 0.5: not sure yet", "class", "batch"
        )
        gain = _family(
            "gate_speedup_ratio", "Emitting unverified over verifying all, in paired blocks", "class", "batch"
        )
        age = _family("guard_baseline_age_seconds", "Time since the last plain full step", "batch")
        tripped = _family("auditor_tripped", "1: served exact, for its routed text broke the promise", "class")
        evidence = _family("auditor_evidence_ratio", "Evidence over what trips, or once tripped re-arms", "class")
        if self.guard is not None:
            for mode, name, batch, track in self.guard.states():
                state.add_metric([mode.value, name, str(batch)], track.trust.value)
                speedup.add_metric([mode.value, name, str(batch)], math.exp(track.mean.value))
            for name, batch, trust, mean in self.guard.gates():
                gate.add_metric([name, str(batch)], trust.value)
                gain.add_metric([name, str(batch)], math.exp(mean.value))
            for batch, seconds in self.guard.ages().items():
                age.add_metric([str(batch)], seconds)
        if self.auditor is not None:
            for name, (stopped, share) in self.auditor.states().items():
                tripped.add_metric([name], stopped)
                evidence.add_metric([name], share)
        yield from (state, speedup, gate, gain, age, tripped, evidence)


def _family(name: str, help: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", help, labels=labels)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self.running = gauge("requests_running", "Requests being decoded")
        self.waiting = gauge("requests_waiting", "Requests waiting for room")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks in use")
        self.info = gauge("info", "1; its labels say what runs", "version", "model", "dtype", "device")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests")
        self.prefix_tokens = counter("prefix_tokens", "Prompt tokens by whether a text before held them", "outcome")
        self.preemptions = counter("preemptions", "Times that a text lost its blocks to an older one")
        self.generation_tokens = counter("generation_tokens", "Tokens generated", "mode", "class")
        self.requests = counter("requests", "Requests finished", "mode", "class", "finish_reason")
        self.errors = counter("request_errors", "Requests answered with an error", "type")
        self.drafts = counter("spec_decode_num_drafts", "Rounds of drafting", "class")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted", "class")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that stood", "class")
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that stood, by position", "class", "position"
        )
        self.fallbacks = counter("fallbacks", "Full passes caused by low confidence or a rejected draft", "class")
        self.unverified = counter("unverified_tokens", "Tokens emitted before a full pass saw them", "class")
        self.divergent = counter(
            "divergent_tokens", "Unverified tokens that were not the full model's choice (expected number)", "class"
        )
        self.seconds = counter("decode_seconds", "Time spent decoding", "mode", "class")
        self.full_seconds = counter(
            "decode_full_equivalent_seconds", "Time the full model alone would have needed", "mode", "class"
        )
        self.first_token = histogram("time_to_first_token_seconds", "From submission to the first text", LONG)
        self.inter_token = histogram("inter_token_latency_seconds", "Time between successive pieces of a text", SHORT)
        self.latency = histogram("e2e_request_latency_seconds", "From submission to the end", LONG)
        self.queue_time = histogram("request_queue_time_seconds", "From submission to admission", LONG)
        self.step_seconds = counter("step_seconds", "Time spent in steps, by whether the runner took it", "part")
        self.in_runner, self.outside = self.step_seconds.labels("runner"), self.step_seconds.labels("engine")
        self.passes = counter("passes", "Passes over the weights", "graph")
        self._passes_of = cache(self.passes.labels)
        self.judges = Judges()
        self.registry.register(self.judges)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", help, buckets=buckets, registry=self.registry)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Read the gauges from the engine whenever they are scraped."""
        self.running.set_function(lambda: stats().running)
        self.waiting.set_function(lambda: stats().waiting)
        self.kv_usage.set_function(lambda: stats().blocks_used / stats().blocks_total)

    def watch_judges(self, guard: Guard, auditor: Auditor) -> None:
        """Read their verdicts whenever they are scraped."""
        self.judges.guard, self.judges.auditor = guard, auditor

    def on_step(self, step: Step) -> None:
        """Add what a step took; what it did for a request shows in the request's accounts."""
        self.in_runner.inc(step.runner_seconds)
        self.outside.inc(max(0.0, step.seconds - step.runner_seconds))
        for graph, passes in step.passes.items():
            self._passes_of(graph).inc(passes)

    def on_finish(self, ran: Ran, times: Times, outcome: str) -> None:
        """Add a finished request's accounts and times."""
        self._count_tokens(ran, outcome)
        if times.admitted is not None:
            self.prefix_tokens.labels("hit").inc(ran.cached_tokens)
            self.prefix_tokens.labels("miss").inc(ran.prompt_tokens - ran.cached_tokens)
        self.preemptions.inc(ran.preemptions)
        self._count_drafts(ran)
        self._count_times(times)

    def _count_tokens(self, ran: Ran, outcome: str) -> None:
        labels = ran.mode.value, ran.class_name
        self.requests.labels(*labels, outcome).inc()
        self.prompt_tokens.inc(ran.prompt_tokens)
        self.generation_tokens.labels(*labels).inc(ran.tokens)
        self.seconds.labels(*labels).inc(ran.seconds)
        self.full_seconds.labels(*labels).inc(ran.full_seconds)

    def _count_drafts(self, ran: Ran) -> None:
        self.drafts.labels(ran.class_name).inc(ran.drafts)
        self.drafted.labels(ran.class_name).inc(ran.drafted)
        self.accepted.labels(ran.class_name).inc(ran.accepted)
        for position, accepted in enumerate(ran.accepted_at):
            self.accepted_at.labels(ran.class_name, str(position)).inc(accepted)
        self.fallbacks.labels(ran.class_name).inc(ran.fallbacks)
        self.unverified.labels(ran.class_name).inc(ran.unverified)
        self.divergent.labels(ran.class_name).inc(ran.divergent)

    def _count_times(self, times: Times) -> None:
        """A request that was cancelled early lacks the later times."""
        if times.admitted is not None:
            self.queue_time.observe(times.admitted - times.submitted)
        if times.updates:
            self.first_token.observe(times.updates[0] - times.submitted)
        for earlier, later in pairwise(times.updates):
            self.inter_token.observe(later - earlier)
        if times.finished is not None:
            self.latency.observe(times.finished - times.submitted)


def metric_names() -> set[str]:
    """Every sample name that `/metrics` can show."""
    families = Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ())}
