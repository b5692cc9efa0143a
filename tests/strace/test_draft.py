"""Drafts: the loop of the torch runner, where it ends, what counts as emitted, and the rule as data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from strace.decoder import Decoder
from strace.draft import Draft, Drafting, DraftLimits, DraftPlan, GainRule, count_alive, extrapolate, plan_steps
from strace.kv import Batch
from strace.runner import FULL
from strace.sampling import Noise, Sampler, SamplingParams, draw_draft
from tests.strace.test_runner import SUBGRAPH, full, graphs, shorten_head, step
from tests.tiny import make_runner, random_tokens, scatter_blocks

__all__ = ["full", "graphs"]  # fixtures


def make_rule(
    step: float = 0.1,
    slope: float = 0.01,
    rate: float = 1.0,
    planned: int = 1,
    stop_ids: Sequence[int] = (),
    always: bool = False,
) -> GainRule:
    """A full step costs 1, a token more `slope`, a draft step `step`; surer drafts stand more often."""
    return GainRule(
        full_seconds=[1 + slope * (n - 1) for n in range(65)],
        draft_seconds=[step + 0.001 * n for n in range(65)],
        tokens_per_second=rate,
        planned=planned,
        acceptance=[*np.linspace(0.3, 0.95, 10).tolist(), 0.8],
        stop_ids=list(stop_ids),
        always=always,
    )


@pytest.mark.parametrize("depths", [[3, 1, 5], [1, 1, 1], [2, 4, 4]])
def test_a_draft_equals_forward_step_by_step(full: Decoder, graphs: dict[str, Decoder], depths: list[int]) -> None:
    coverage, ids = 0.8, list(range(0, 300, 2))
    graphs = graphs | {SUBGRAPH: shorten_head(graphs[SUBGRAPH], ids, coverage)}
    verified, pending = [40, 31, 7], [1, 3, 2]
    texts = [random_tokens(v + p, seed=v) for v, p in zip(verified, pending, strict=True)]
    runners = make_runner(graphs), make_runner(graphs)
    tables = scatter_blocks([len(t) + 6 for t in texts], runners[0].cache.blocks)
    for runner in runners:
        for text, v, table in zip(texts, verified, tables, strict=True):
            runner.forward(FULL, step(text[:v], 0, table), [0])
    params = SamplingParams(0.9, presence_penalty=0.5)
    samplers = [Sampler(params, Noise(s, s == 1), len(text), [3, 3]) for s, text in enumerate(texts)]
    plan = DraftPlan(samplers, [DraftLimits(n, 0, n, 2.0) for n in depths], make_rule(always=True))
    tokens = torch.cat([text[v:] for text, v in zip(texts, verified, strict=True)])
    drafts = runners[0].draft(SUBGRAPH, Batch(tokens.tolist(), pending, verified, tables), plan)

    assert [len(draft.tokens) for draft in drafts] == depths
    for s, (text, table, draft) in enumerate(zip(texts, tables, drafts, strict=True)):
        new, start = text[verified[s] :], verified[s]
        for depth, token in enumerate(draft.tokens):
            (row,) = runners[1].forward(SUBGRAPH, step(new, start, table), [len(new) - 1])
            q = samplers[s].process(row.expand(depth + 1, -1), draft.tokens)[depth]
            assert draft.q is not None
            assert (draft.q[depth] - q).abs().max() <= 1e-5
            assert draft.confidence[depth] == pytest.approx(row.softmax(-1).max().item() * coverage, abs=1e-5)
            assert token == draw_draft(draft.q[depth], samplers[s].noise, len(text) + depth)
            start, new = start + len(new), torch.tensor([token])


def test_timed_steps_are_drawn_and_as_many_as_asked(graphs: dict[str, Decoder]) -> None:
    runner = make_runner(graphs)
    tables = scatter_blocks([9, 9], runner.cache.blocks)
    drafts = runner.draft(SUBGRAPH, Batch(random_tokens(2).tolist(), [1, 1], [0, 0], tables), plan_steps(2, 3))
    assert count_alive(drafts) == [2, 2, 2]
    assert all(draft.q is not None for draft in drafts), "drawing is a part of what a step costs"


def draw_rows(drafting: Drafting, rows: list[tuple[int, float]]) -> Drafting:
    """Draw the given tokens with the given confidence."""
    for token, confidence in rows:
        row: Tensor = torch.zeros(20)
        row[token] = 50.0
        assert drafting.draw(row, confidence)
        assert drafting.tokens[-1] == token
    return drafting


def make_drafting(threshold: float, rule: GainRule | None = None, most: int = 9) -> Drafting:
    limits = DraftLimits(held=3, emitted=5, room=most, threshold=threshold)
    return Drafting(Sampler(SamplingParams(), Noise(0, shared=False), 0), limits, rule or make_rule(always=True))


@pytest.mark.parametrize(
    ("rows", "threshold", "emitted"),
    [
        ([(1, 0.95), (2, 0.9), (3, 0.99)], 0.9, 3),
        ([(1, 0.95), (2, 0.8), (3, 0.99)], 0.9, 1),
        ([(1, 0.95), (7, 0.99), (3, 0.99)], 0.9, 1),
        ([(1, 1.0)], 1.1, 0),
    ],
)
def test_what_counts_as_emitted(rows: list[tuple[int, float]], threshold: float, emitted: int) -> None:
    drafting = draw_rows(make_drafting(threshold, make_rule(stop_ids=[7])), rows)
    assert drafting.emitted == emitted
    expected = np.prod([drafting.rule.stands(sure) for _, sure in rows[emitted:]])
    assert drafting.survival == pytest.approx(expected)


def test_a_draft_ends_at_its_limits_and_at_stop_tokens() -> None:
    unsure, sure = (1, 0.5), (1, 0.95)
    assert draw_rows(make_drafting(0.9), [unsure] * 2).goes_on(1, 2)
    assert not draw_rows(make_drafting(0.9), [unsure] * 3).goes_on(1, 3)
    assert draw_rows(make_drafting(0.9), [sure] * 4).goes_on(1, 4)
    assert not draw_rows(make_drafting(0.9), [sure] * 5).goes_on(1, 5)
    assert draw_rows(make_drafting(0.9), [*[sure] * 4, unsure, unsure]).goes_on(1, 6)
    assert not draw_rows(make_drafting(0.9, most=6), [*[sure] * 4, unsure, unsure]).goes_on(1, 6)
    stopping = make_rule(always=True, stop_ids=[1])
    assert not draw_rows(make_drafting(0.9, stopping), [unsure]).goes_on(1, 1)


def test_another_token_is_drawn_only_where_it_pays() -> None:
    assert draw_rows(make_drafting(2.0, make_rule(step=0.3)), [(1, 0.95)]).goes_on(1, 1)
    assert not draw_rows(make_drafting(2.0, make_rule(step=0.3)), [(1, 0.05)]).goes_on(1, 1)


def test_beyond_a_table_the_last_slope_goes_on() -> None:
    table = [0.0, 1.0, 3.0]
    assert [extrapolate(table, n) for n in (0, 1, 2, 3, 10)] == [0, 1, 3, 5, 19]


def test_sequences_of_each_step() -> None:
    assert count_alive([Draft([0] * n, [1.0] * n, None) for n in (3, 1, 2)]) == [3, 2, 1]
