"""The soak's verdicts: what is as it should be passes, and each thing that is not is named."""

from __future__ import annotations

import os
import random
from collections import Counter

from soak import EVERY, Looks, Tally, judge, read_metrics

FIGURES = Counter({"requests_total": 14.0, "ended_stop": 10.0, "ended_cancelled": 4.0, "requests_running": 0.0})


def state() -> tuple[Tally, Looks, Counter[str]]:
    """A tally, looks and figures with which all is well."""
    dice, looks = random.Random(0), Looks()
    for second in range(100):
        looks.seconds.append(float(second))
        looks.memory.append(10**9 + dice.randint(0, 10**7))
        looks.files.append(10)
        looks.threads.append(5)
    return Tally(texts=10, left=6, answers={"question 0": {"a"}}), looks, Counter(FIGURES)


def test_all_is_well() -> None:
    assert judge(*state()) == {}


def test_what_is_wrong_is_named() -> None:
    tally, looks, figures = state()
    figures.update({"requests_running": 1, "kv_cache_usage_ratio": 0.5, "ended_error": 2, "requests_total": 3})
    tally.faults.append("a stream broke")
    tally.answers["question 0"].add("b")
    looks.memory = [m + second * 10**6 for second, m in enumerate(looks.memory)]
    looks.files[-1], looks.threads[-1] = 12, 6
    expected = {"faults", "requests left", "blocks left", "files left", "threads left", "failed", "memory"}
    assert judge(tally, looks, figures).keys() == expected | {"ended twice or never", "answers differ"}
    assert judge(tally, looks, Counter({**figures, "requests_total": 9}))["ended twice or never"].startswith("9,")


def test_time_that_it_was_stopped_does_not_count() -> None:
    looks = Looks()
    looks.last -= 1000
    looks.take(os.getpid())
    assert looks.ran == 2 * EVERY
    looks.take(os.getpid())
    assert 2 * EVERY < looks.ran < 3 * EVERY


def test_metrics_are_summed_over_labels() -> None:
    text = (
        "# HELP x y\nstrace_llm_requests_running 2.0\n"
        'strace_llm_requests_total{class="a",finish_reason="stop",mode="exact"} 3.0\n'
        'strace_llm_requests_total{class="b",finish_reason="stop",mode="full"} 1.0\n'
        'strace_llm_prefix_tokens_total{outcome="hit"} 5.0\nstrace_llm_prefix_tokens_total{outcome="miss"} 7.0\n'
    )
    figures = read_metrics(text)
    assert (figures["requests_running"], figures["requests_total"], figures["ended_stop"]) == (2, 4, 4)
    assert (figures["held_hit"], figures["prefix_tokens_total"]) == (5, 12)
