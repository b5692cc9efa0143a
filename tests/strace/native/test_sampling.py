"""Native sampling against strace/sampling.py: random numbers to the bit, distributions, settled blocks, their law."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from strace import native
from strace.draft import Held
from strace.native_runner import NativeRunner
from strace.runner import FULL
from strace.sampling import Noise, Purpose, Sampler, SamplingParams, audit, draw_draft, draw_token, process, verify
from tests.strace.native.passes import load_tiny, make_batch, make_native

SUSPICION = 1e-4


@cache
def runner() -> NativeRunner:
    return make_native({FULL: load_tiny()}, 1)


@pytest.mark.parametrize("key", [0, 1, 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 7, 40_000, 2**31 + 5])
@pytest.mark.parametrize("purpose", Purpose)
def test_random_numbers_are_those_of_numpy(key: int, position: int, purpose: Purpose) -> None:
    got = np.empty(1001)
    native.load().st_uniform(key, position, purpose, len(got), got.ctypes.data)
    assert np.array_equal(got, Noise(key, shared=True).uniform(position, purpose, len(got)))


@st.composite
def parameters(draw_from: Any) -> SamplingParams:
    return SamplingParams(
        temperature=draw_from(st.sampled_from([0.0, 1e-40, 0.05, 0.7, 1.0, 1.9])),
        top_p=draw_from(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.0917, 0.0])),
        top_k=draw_from(st.sampled_from([0, 1, 2, 7, 50, 301])),
        presence_penalty=draw_from(st.sampled_from([0.0, 0.5, -1.25])),
        frequency_penalty=draw_from(st.sampled_from([0.0, 0.25, -0.5])),
        min_p=draw_from(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=draw_from(st.sampled_from([1.0, 1.3, 0.8])),
        logit_bias=draw_from(st.sampled_from([(), ((0, 2.5),), ((0, -100.0), (1, 1.0))])),
    )


def make_logits(rows: int, vocabulary: int, seed: int, ties: bool, masked: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    if ties:
        logits = (2 * logits).round() / 2
    if masked:
        logits[:, torch.rand(vocabulary, generator=generator) < 0.3] = -torch.inf
        logits[:, 0] = 0.0
    return logits


def splits_a_rounding(logits: Tensor, histories: list[list[int]], params: SamplingParams) -> bool:
    """Whether top_p falls so near a cumulative sum that float32 decides which side it is on."""
    whole = process(logits, histories, SamplingParams(**(vars(params) | {"top_p": 1.0}))).double()
    reached = whole.sort(dim=1, descending=True).values.cumsum(1)
    splits = params.top_p < 1 and bool(((reached - params.top_p).abs() < 2e-6).any())
    open_end = process(logits, histories, SamplingParams(**(vars(params) | {"top_p": 1.0, "top_k": 0, "min_p": 0.0})))
    least = open_end / open_end.amax(1, keepdim=True)
    return splits or (params.min_p > 0 and bool(((least / params.min_p - 1).abs() < 1e-5).any()))


@settings(max_examples=300)
@given(
    parameters(),
    st.sampled_from([1, 2, 31, 300, 5000]),
    st.integers(0, 10_000),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 300), max_size=20),
)
def test_distributions_equal_the_reference(
    params: SamplingParams, vocabulary: int, seed: int, ties: bool, masked: bool, history: list[int]
) -> None:
    params = replace(params, logit_bias=tuple(pair for pair in params.logit_bias if pair[0] < vocabulary))
    known = [token for token in history if token < vocabulary]
    before, drafts = known[:-2], known[-2:]
    logits = make_logits(len(drafts) + 1, vocabulary, seed, ties, masked)
    prompt, barred = known[:3], [vocabulary // 2] if vocabulary > 2 else []
    sampler = Sampler(params, Noise(0, shared=False), 5, before, prompt, barred, 6)
    expected = sampler.process(logits, drafts)
    histories = [before + drafts[:i] for i in range(len(logits))]
    open_logits = logits.clone()
    open_logits[:1, barred] = -torch.inf
    assume(not splits_a_rounding(open_logits, histories, params))
    got = runner().process(logits.clone(), drafts, sampler)
    assert (got - expected).abs().max() <= 1e-6
    assert torch.equal(got > 1e-30, expected > 1e-30)


def test_rows_of_no_number_do_no_harm() -> None:
    logits = torch.full((1, 300), torch.nan)
    for params in (SamplingParams(0.0), SamplingParams(top_k=3, top_p=0.5), SamplingParams()):
        sampler = Sampler(params, Noise(0, shared=True), 0)
        assert 0 <= runner().verify(logits.clone(), [Held(0, [], None, sampler)])[0].tokens[0] < 300


@settings(max_examples=300, derandomize=True)
@given(
    parameters(),
    st.lists(st.integers(0, 4), min_size=3, max_size=3).map(sorted),
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 3.0]),
)
def test_a_block_is_settled_and_audited_as_by_the_reference(
    params: SamplingParams, counts: list[int], seed: int, shared: bool, apart: float
) -> None:
    """counts: tokens emitted, audited, drafted. apart: how far the draft's logits are from the full model's."""
    emitted, audited, drafts = counts
    logits = make_logits(drafts + 1, 300, seed, False, False)
    near = logits + apart * make_logits(drafts + 1, 300, seed + 1, False, False)
    sampler = Sampler(params, Noise(seed, shared), seed, [1, 2, 2])
    tokens: list[int] = []
    rows = []
    for i in range(drafts):
        rows.append(sampler.process(near[: i + 1], tokens)[i])
        tokens.append(draw_draft(rows[i], sampler.noise, sampler.position + i))
    q = torch.stack(rows) if rows and not sampler.greedy else None
    p = sampler.process(logits, tokens)
    expected = verify(p, q, tokens, sampler.noise, sampler.position, emitted)
    divergences = audit(p, q, tokens[: min(audited, len(expected))], sampler.noise, sampler.position)
    held = Held(0, tokens, q, sampler, emitted, audited)
    # A text before and one behind: what is told of one must not be another's.
    first, got, last = runner().verify(torch.cat([logits[:1], logits, logits[:1]]), [
        Held(0, [], None, sampler), replace(held, row=1), Held(len(logits) + 1, [], None, sampler)
    ])  # fmt: skip
    assert got.tokens == expected
    assert got.divergences == pytest.approx(divergences, abs=1e-5)
    assert first == last
    assert not first.divergences


@settings(max_examples=50, derandomize=True)
@given(
    st.lists(st.tuples(parameters(), st.integers(0, 3), st.booleans()), min_size=1, max_size=5), st.integers(0, 10_000)
)
def test_a_pass_and_its_verdict_in_one_call_are_those_of_two(
    texts: list[tuple[SamplingParams, int, bool]], seed: int
) -> None:
    """Also behind a text of whose rows none is wanted."""
    counts = [3, *(count + 1 for _, count, _ in texts)]
    batch = make_batch(counts, [0] * len(counts), seed)
    held, rows, end = [], list[int](), 3
    for number, (params, count, seeded) in enumerate(texts):
        drafts = batch.tokens[end + 1 : end + 1 + count]
        q = make_logits(count, 300, seed + number, False, False).softmax(1) if count and params.temperature else None
        sampler = Sampler(params, Noise(seed, seeded), 1, [1, 2], [3])
        held.append(Held(len(rows), drafts, q, sampler))
        rows += range(end, end + count + 1)
        end += count + 1
    expected = runner().verify(runner().forward(FULL, batch, rows), held)
    assert runner().verify_pass(batch, rows, held) == expected
    assert runner().verify_pass(batch, [], []) == []


@settings(max_examples=50, derandomize=True)
@given(st.lists(parameters(), min_size=1, max_size=4), st.integers(0, 10_000))
def test_samplers_that_go_with_their_texts_are_as_made_anew(shapes: list[SamplingParams], seed: int) -> None:
    """What the runner keeps of a sampler must follow its position and history, and others that take its place."""
    going = [Sampler(params, Noise(seed, shared=False), 2, [], [5], [7], 4) for params in shapes]
    for step in range(4):
        logits = make_logits(len(going), 300, seed + step, False, False)
        anew = [Sampler(s.params, s.noise, s.position, [*s.history], s.prompt, s.barred, s.barred_until) for s in going]
        expected = runner().verify(logits.clone(), [Held(i, [], None, sampler) for i, sampler in enumerate(anew)])
        got = runner().verify(logits.clone(), [Held(i, [], None, sampler) for i, sampler in enumerate(going)])
        assert got == expected
        for sampler, ((token,), _) in zip(going, got, strict=True):
            sampler.position += 1
            sampler.history.append(token)
        going = going[-1:] + going[:-1]


def test_blocks_follow_the_full_models_law() -> None:
    """Joint law of the first two tokens over many seeds, where the rows depend on the draft before them."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, 4, generator=generator).mul(1.5)  # row 4: at start
    full, subgraph = logits.softmax(1), torch.randn(5, 4, generator=generator).mul(1.5).softmax(1)
    counts = np.zeros((4, 4))
    for seed in range(6000):
        noise = Noise(seed, shared=False)
        first = draw_draft(subgraph[4], noise, 0)
        second = draw_draft(subgraph[first], noise, 1)
        rows = [4, first, second]
        held = Held(0, rows[1:], subgraph[rows[:2]], Sampler(SamplingParams(), noise, 0))
        ((emitted, _),) = runner().verify(logits[rows], [held])
        if len(emitted) == 1:  # the next block begins with a plain draw
            emitted.append(draw_token(full[emitted[0]], noise, 1))
        counts[emitted[0], emitted[1]] += 1
    law = (full[4][:, None] * full[:4]).double().numpy()
    assert stats.chisquare(counts.ravel(), law.ravel() / law.sum() * counts.sum()).pvalue > SUSPICION


@settings(max_examples=100, derandomize=True)
@given(parameters(), st.sampled_from([31, 300]), st.integers(0, 10_000), st.floats(0, 1))
def test_only_what_is_allowed_has_probability(params: SamplingParams, vocabulary: int, seed: int, share: float) -> None:
    """As by the reference, by what precedes each row; a row of which nothing would be left stays as it was."""
    logits, drafts = make_logits(3, vocabulary, seed, False, False), [1, 2]
    masks = np.random.default_rng(seed).random((3, vocabulary)) < share

    def allowed(before: Any) -> np.ndarray:
        assert list(before) == drafts[: len(before)]
        padded = np.zeros(-(-vocabulary // 32) * 32, dtype=np.uint8)
        padded[:vocabulary] = masks[len(before)]
        return np.packbits(padded, bitorder="little").view(np.uint32)

    sampler = Sampler(params, Noise(0, shared=False), 5, [3], [4], allowed=allowed)
    restricted = logits.clone()
    for row, mask in zip(restricted, masks, strict=True):
        row[torch.from_numpy(~mask)] = -torch.inf if mask.any() else 0.0 * row[0]
        if not mask.any():
            row.copy_(logits[list(masks.any(1)).index(False)])
    expected = sampler.process(logits.clone(), drafts)
    assume(not splits_a_rounding(restricted, [[3], [3, 1], [3, 1, 2]], params))
    got = runner().process(logits.clone(), drafts, sampler)
    assert (got - expected).abs().max() <= 1e-6
    for row, mask in zip(got, masks, strict=True):
        assert not mask.any() or not row[torch.from_numpy(~mask)].any()
