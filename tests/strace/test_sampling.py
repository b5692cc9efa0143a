"""Sampling: the processed distributions against plain references, the noise, and the law of speculative
verification."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from strace.sampling import (
    Noise,
    Purpose,
    SamplingParams,
    acceptance,
    accepts,
    draw,
    draw_draft,
    draw_residual,
    draw_token,
    process,
    residual,
    total_variation,
    verify,
)

V = 12
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V)
PROMPT = [0, 3]
SUSPICION = 1e-4  # a chi-square p-value below this, at fixed seeds, is a wrong law


def process_plainly(logits: list[float], history: list[int], params: SamplingParams) -> list[float]:
    """`process` for one row in ordinary float64 Python."""
    counts, bias, r = Counter(history), dict(params.logit_bias), params.repetition_penalty
    scores = [x + bias.get(i, 0) for i, x in enumerate(logits)]
    scores = [(x / r if x > 0 else x * r) if i in {*history, *PROMPT} else x for i, x in enumerate(scores)]
    scores = [
        x - params.frequency_penalty * counts[i] - params.presence_penalty * (i in counts) for i, x in enumerate(scores)
    ]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.temperature == 0:
        return [float(i == order[0]) for i in range(len(scores))]
    weights = [math.exp((x - scores[order[0]]) / params.temperature) for x in scores]
    order = [i for i in order if weights[i] >= params.min_p]
    kept = order[: params.top_k] if params.top_k else order
    total, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if params.top_p == 1 or before < params.top_p or not nucleus:
            nucleus.append(i)
        before += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(scores))]


@st.composite
def parameters(draw_from: Any) -> SamplingParams:
    return SamplingParams(
        temperature=draw_from(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9])),
        # Not near any sum of a few equal shares, where float32 and float64 may part over the last id.
        top_p=draw_from(st.sampled_from([1.0, 0.9137, 0.5371, 0.0917])),
        top_k=draw_from(st.integers(0, V + 1)),
        presence_penalty=draw_from(st.sampled_from([0.0, 0.5, -1.25])),
        frequency_penalty=draw_from(st.sampled_from([0.0, 0.25, -0.5])),
        # Not near a ratio of two weights of quarter steps.
        min_p=draw_from(st.sampled_from([0.0, 0.0123, 0.3217])),
        repetition_penalty=draw_from(st.sampled_from([1.0, 2.0, 0.5])),
        logit_bias=draw_from(st.sampled_from([(), ((0, 2.5),), ((1, -100.0), (2, 1.0))])),
    )


@given(LOGITS, st.lists(st.integers(0, V - 1), max_size=20), parameters())
def test_process_equals_a_plain_reference(logits: list[float], history: list[int], params: SamplingParams) -> None:
    logits = [round(4 * x) / 4 for x in logits]  # ties, and scores that float32 holds exactly
    got = process(torch.tensor([logits]), [history], params, PROMPT)[0]
    assert got.sum().item() == pytest.approx(1, abs=1e-6)
    assert got.tolist() == pytest.approx(process_plainly(logits, history, params), abs=1e-5)


def test_process_counts_each_row_by_its_own_history_and_leaves_its_argument() -> None:
    rows = torch.zeros(3, V)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
    got = process(rows, [[], [2], [2, 2, 5]], params)
    assert torch.equal(rows, torch.zeros(3, V))
    ratios = (got / got[:, :1]).log()
    assert ratios[0].tolist() == pytest.approx([0] * V, abs=1e-5)
    assert ratios[1, 2].item() == pytest.approx(-2, abs=1e-5)
    assert ratios[2, [2, 5]].tolist() == pytest.approx([-3, -2], abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-12, 1e-3])
def test_low_temperature_becomes_greedy(temperature: float) -> None:
    rows = torch.tensor([[1.0, 30.0, 29.0, -torch.inf], [0.0, -4.0, -9.0, -torch.inf]])
    assert process(rows, [[], []], SamplingParams(temperature)).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_greedy_and_top_k_break_ties_by_the_lowest_id() -> None:
    rows = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    assert process(rows, [[]], SamplingParams(temperature=0)).tolist() == [[0, 1, 0, 0]]
    assert process(rows, [[]], SamplingParams(top_k=2)).tolist() == [[0, 0.5, 0.5, 0]]
    many = process(torch.zeros(2, 5000), [[], []], SamplingParams(top_k=10))
    assert torch.equal(many.nonzero()[:, 1], torch.arange(10).repeat(2))


def test_top_p_of_zero_keeps_the_best_token() -> None:
    assert process(torch.tensor([[1.0, 3.0, 2.0]]), [[]], SamplingParams(top_p=0.0)).tolist() == [[0, 1, 0]]


def test_noise_is_a_pure_function_of_seed_position_and_purpose() -> None:
    keys = list(itertools.product([0, 1, 2**63, -1], [0, 1, 40_000], Purpose))
    first = {key: Noise(key[0], False).uniform(key[1], key[2], 12).tolist() for key in keys}
    noises = {seed: Noise(seed, True) for seed in (0, 1, 2**63, -1)}
    again = {key: noises[key[0]].uniform(key[1], key[2], 12).tolist() for key in reversed(keys)}
    assert first == again
    numbers = [x for drawn in first.values() for x in drawn]
    assert len(set(numbers)) == len(numbers)
    # A token's own number does not depend on how many others are drawn beside it (a vocabulary may be padded).
    assert noises[1].uniform(7, Purpose.TOKEN, 100)[:4].tolist() == noises[1].uniform(7, Purpose.TOKEN, 4).tolist()


def test_numbers_are_uniform_and_independent_over_positions_and_purposes() -> None:
    noise = Noise(3, False)
    table = np.array([[noise.uniform(position, purpose)[0] for purpose in Purpose] for position in range(2000)])
    for column in table.T:
        assert stats.kstest(column, "uniform").pvalue > SUSPICION
        assert stats.spearmanr(column[1:], column[:-1]).pvalue > SUSPICION
    for a, b in itertools.combinations(range(len(Purpose)), 2):
        assert stats.spearmanr(table[:, a], table[:, b]).pvalue > SUSPICION


def fits(counts: np.ndarray, law: Tensor) -> bool:
    """Whether counts over ids agree with a law by a chi-square test, and no impossible id was drawn."""
    possible = law.double().numpy() > 0
    wanted = law.double().numpy()[possible]
    if counts[~possible].any():
        return False
    return bool(stats.chisquare(counts[possible], wanted / wanted.sum() * counts.sum()).pvalue > SUSPICION)


def test_draw_follows_its_law() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    for by_position in (True, False):
        drawn = [
            draw(p, Noise(9, False), i, Purpose.TOKEN) if by_position else draw(p, Noise(i, False), 9, Purpose.TOKEN)
            for i in range(4000)
        ]
        assert fits(np.bincount(drawn, minlength=5), p)


def test_draw_of_a_certain_token_needs_no_noise() -> None:
    assert draw(torch.tensor([0.0, 0.0, 1.0]), Noise(0, False), 0, Purpose.TOKEN) == 2


@st.composite
def laws(draw_from: Any) -> Tensor:
    """float32 distributions [V]: smooth, sparse, one-hot, and with extremely small entries."""
    rows = torch.tensor([draw_from(LOGITS)])
    params = SamplingParams(
        temperature=draw_from(st.sampled_from([0.0, 0.05, 0.5, 1.0, 3.0])),
        top_k=draw_from(st.sampled_from([0, 1, 3, 7])),
    )
    return process(rows, [[]], params)[0]


def first_token_law(p: Tensor, q: Tensor) -> Tensor:
    """float64 [V], in closed form: a draft from q stands with its acceptance, else the residual takes its place."""
    stands = torch.tensor([acceptance(p, q, token) for token in range(V)], dtype=torch.float64)
    accepted = q.double() * stands
    return accepted + (1 - accepted.sum()) * residual(p, q).double()


@given(laws(), laws())
def test_verification_leaves_the_full_models_law(p: Tensor, q: Tensor) -> None:
    assert (first_token_law(p, q) - p.double()).abs().max() <= 1e-6
    stands = sum(float(q[token]) * acceptance(p, q, token) for token in range(V))
    assert stands == pytest.approx(1 - total_variation(p, q).item(), abs=1e-5)


@given(laws())
def test_equal_laws_accept_everything(p: Tensor) -> None:
    assert all(acceptance(p, p, token) == 1 for token in range(V))
    assert torch.equal(residual(p, p), p)


@given(laws(), laws(), st.integers(0, 10_000))
def test_a_replacement_is_possible_for_the_full_model(p: Tensor, q: Tensor, seed: int) -> None:
    noise = Noise(seed, False)
    token = draw_draft(q, noise, 5)
    assert q[token] > 0
    if not accepts(p, q, token, noise, 5):
        token = draw_residual(p, q, noise, 5)
    assert p[token] > 0


def test_verify_draws_whole_blocks_from_the_full_models_law() -> None:
    """Joint law of the first two tokens over many seeds, where the rows depend on the draft before them."""
    generator = torch.Generator().manual_seed(5)
    full, subgraph = (torch.randn(5, 4, generator=generator).mul(1.5).softmax(1) for _ in range(2))  # row 4: at start
    counts = np.zeros((4, 4), dtype=np.int64)
    lengths = Counter()
    for seed in range(6000):
        noise = Noise(seed, False)
        first = draw_draft(subgraph[4], noise, 0)
        second = draw_draft(subgraph[first], noise, 1)
        p, q = full[[4, first, second]], subgraph[[4, first]]
        emitted = verify(p, q, [first, second], noise, 0)
        lengths[len(emitted)] += 1
        if len(emitted) == 1:  # the next block begins with a plain draw
            emitted.append(draw_token(full[emitted[0]], noise, 1))
        counts[emitted[0], emitted[1]] += 1
    assert set(lengths) == {1, 2, 3}
    assert fits(counts.flatten(), (full[4][:, None] * full[:4]).flatten())


def test_verify_of_no_drafts_is_a_plain_draw() -> None:
    p = torch.tensor([[0.25, 0.75]])
    for seed in range(20):
        noise = Noise(seed, False)
        assert verify(p, p[:0], [], noise, 3) == [draw_token(p[0], noise, 3)]


@given(st.lists(laws(), min_size=4, max_size=4), st.lists(st.integers(0, V - 1), max_size=3), st.integers(0, 10_000))
def test_a_seed_makes_the_text_independent_of_the_drafts(rows: list[Tensor], drafts: list[int], seed: int) -> None:
    noise, p, n = Noise(seed, True), torch.stack(rows), len(drafts)
    plain = [draw_token(row, noise, 7 + i) for i, row in enumerate(p)]
    emitted = verify(p[: n + 1], torch.full((n, V), 1 / V), drafts, noise, 7)
    assert emitted == plain[: len(emitted)]
    agree = next((i for i in range(n) if drafts[i] != plain[i]), n)
    assert len(emitted) == agree + 1


def test_a_seed_makes_an_equal_draft_always_stand() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert all(draw_draft(p, Noise(s, True), 2) == draw_token(p, Noise(s, True), 2) for s in range(50))
    assert any(draw_draft(p, Noise(s, False), 2) != draw_token(p, Noise(s, False), 2) for s in range(50))


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [([1.0, 0.0], [0.0, 1.0], 1.0), ([0.5, 0.5], [0.5, 0.5], 0.0), ([0.7, 0.3], [0.4, 0.6], 0.3)],
)
def test_total_variation(p: list[float], q: list[float], expected: float) -> None:
    assert total_variation(torch.tensor(p), torch.tensor(q)).item() == pytest.approx(expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_row_of_no_number_gives_a_token(value: float, shared: bool) -> None:
    assert 0 <= draw_token(torch.full((V,), value), Noise(1, shared), 5) < V
