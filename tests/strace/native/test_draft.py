"""Whole drafts of the native runner against the torch runner's, over equal weights and caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strace.decoder import Decoder
from strace.draft import DraftLimits, DraftPlan, GainRule
from strace.native_runner import NativeRunner
from strace.runner import FULL, TorchRunner
from strace.sampling import Noise, Sampler, SamplingParams
from tests.strace.native.passes import BLOCKS, SUBGRAPH, cut, fill_cache, load_tiny, make_batch, make_native
from tests.strace.test_draft import make_rule
from tests.tiny import make_runner

EVEN = list(range(0, 300, 2))
VOCABULARY, MOST = 300, 40


def make_pair(graphs: dict[str, Decoder]) -> tuple[NativeRunner, TorchRunner]:
    pair = make_native(graphs), make_runner(graphs, BLOCKS)
    fill_cache(*pair)
    return pair


samplers = st.builds(
    Sampler,
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 20]),
        presence_penalty=st.sampled_from([0.0, 0.9]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
    ),
    st.builds(Noise, st.integers(0, 2**64 - 1), st.booleans()),
    st.integers(0, 10_000),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
)
limits = st.builds(
    DraftLimits, st.integers(1, 8), st.integers(1, 12), st.integers(1, 20), st.sampled_from([0.0, 0.01, 0.03, 2.0])
)


def raise_from(rule: GainRule, tokens: int) -> GainRule:
    """Passes over so many tokens and more take longer at once, as where a kernel ends."""
    return replace(rule, full_seconds=[s + 5 * (n >= tokens) for n, s in enumerate(rule.full_seconds)])


rules = st.builds(
    raise_from,
    st.builds(
        make_rule,
        step=st.sampled_from([0.05, 0.5, 0.9]),
        slope=st.sampled_from([0.01, 0.3]),
        rate=st.sampled_from([1.0, 1.6]),
        planned=st.integers(1, 5),
        stop_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=40),
        always=st.booleans(),
    ),
    st.integers(2, 16),
)


@settings(max_examples=100, derandomize=True)
@given(st.data(), rules)
def test_a_draft_equals_the_torch_runners(data: st.DataObject, rule: GainRule) -> None:
    sequences = data.draw(st.integers(1, 4))

    def each(strategy: st.SearchStrategy) -> list:
        return data.draw(st.lists(strategy, min_size=sequences, max_size=sequences))

    plan = DraftPlan(each(samplers), each(limits), rule)
    batch = make_batch(each(st.integers(1, 3)), each(st.integers(0, 200)), room=MOST)
    full = load_tiny()
    graphs = {FULL: full, SUBGRAPH: cut(full, data.draw(st.sampled_from([None, EVEN])))}
    ours, theirs = (runner.draft(SUBGRAPH, batch, plan) for runner in make_pair(graphs))
    for got, wanted, sampler in zip(ours, theirs, plan.samplers, strict=True):
        assert got.tokens == wanted.tokens
        assert got.confidence == pytest.approx(wanted.confidence, abs=1e-5)
        assert (got.q is None) == (wanted.q is None) == sampler.greedy
        if got.q is not None and wanted.q is not None:
            assert (got.q - wanted.q).abs().max() <= 1e-5


def test_what_a_sequence_drafts_does_not_depend_on_the_others() -> None:
    full = load_tiny()
    graphs = {FULL: full, SUBGRAPH: cut(full, EVEN)}
    counts, starts = [2, 1, 3], [100, 40, 7]
    shapes = SamplingParams(), SamplingParams(0.0), SamplingParams(0.7, top_p=0.9)
    drawing = [Sampler(params, Noise(s, s == 2), 9) for s, params in enumerate(shapes)]
    ends = [DraftLimits(n, 0, n, 2.0) for n in (6, 2, 4)]
    rule = make_rule(always=True)
    batch = make_batch(counts, starts, room=MOST)
    runner = make_native(graphs)
    fill_cache(runner)
    together = runner.draft(SUBGRAPH, batch, DraftPlan(drawing, ends, rule))
    for s, draft in enumerate(together):
        alone = make_native(graphs)
        fill_cache(alone)
        first = sum(counts[:s])
        tokens = batch.tokens[first : first + counts[s]]
        one = type(batch)(tokens, [counts[s]], [starts[s]], batch.tables[s : s + 1])
        (again,) = alone.draft(SUBGRAPH, one, DraftPlan([drawing[s]], [ends[s]], rule))
        assert (again.tokens, again.confidence) == (draft.tokens, draft.confidence)
        assert again.q is None or torch.equal(again.q, draft.q)


@pytest.mark.parametrize(
    ("shaped", "barred"),
    [
        ({"temperature": 0.5}, ()),
        ({"top_k": 3}, ()),
        ({"top_p": 0.5}, ()),
        ({"min_p": 0.5}, ()),
        ({"presence_penalty": 2.0}, ()),
        ({"frequency_penalty": 2.0}, ()),
        ({"repetition_penalty": 3.0}, ()),
        ({"logit_bias": tuple((id, 9.0) for id in range(0, 300, 7))}, ()),
        ({}, range(0, 300, 3)),
    ],
)
def test_confidence_is_of_the_row_before_it_is_shaped(shaped: dict, barred: Iterable[int]) -> None:
    """At temperature 1 and with nothing else asked for it is read from the shaped row, which says the same then."""
    full = load_tiny()
    runner = make_native({FULL: full, SUBGRAPH: cut(full, EVEN)})
    fill_cache(runner)
    batch = make_batch([1], [50], room=MOST)

    def confidence(params: SamplingParams, history: list[int], barred: list[int]) -> list[float]:
        sampler = Sampler(params, Noise(1, True), 9, history, history, barred, 20)
        plan = DraftPlan([sampler], [DraftLimits(1, 0, 1, 2.0)], make_rule(always=True))
        return runner.draft(SUBGRAPH, batch, plan)[0].confidence

    plain = confidence(SamplingParams(), [], [])
    assert confidence(SamplingParams(**shaped), list(range(200)), list(barred)) == plain
    assert 0 < plain[0] < 0.5
