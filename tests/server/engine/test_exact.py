"""`exact` gives the full model's text: token for token with a seed or greedily, in distribution without one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.engine.options import Options
from server.engine.request import Mode, Request
from strace.decoder import DenseAttend
from strace.sampling import SamplingParams
from tests.server.engine.harness import (
    VOCABULARY,
    decode,
    decode_full,
    graphs,
    make_engine,
    make_request,
)

CLASSES = ("pooled", "lame", "stranger")

shapes = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 20]),
    presence_penalty=st.sampled_from([0.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((5, 3.0), (260, -100.0))]),
    seed=st.integers(0, 2**63),
)
requests = st.builds(
    Request,
    id=st.just("r"),
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=80),
    params=shapes,
    max_tokens=st.integers(8, 24),
    mode=st.sampled_from([Mode.EXACT, Mode.EXACT, Mode.FULL]),
    class_name=st.sampled_from(CLASSES),
    max_draft=st.sampled_from([None, None, 0, 2]),
    stop_ids=st.sampled_from([(), (7, 11, 100)]),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 1, 8]),
    logprobs=st.sampled_from([None, 0, 3]),
    prompt_logprobs=st.booleans(),
)


@settings(max_examples=25, derandomize=True)
@given(
    data=st.data(), batch=st.lists(requests, min_size=1, max_size=4), length=st.sampled_from([None, 1, 2, 3, 4, 5, 6])
)
def test_same_text_as_the_full_model(data: st.DataObject, batch: list[Request], length: int | None) -> None:
    stop_ids = data.draw(st.sets(st.integers(0, 299), max_size=12), "stop_ids")
    stopping = []
    for request, unstopped in zip(batch, decode_full(*batch), strict=True):
        start = data.draw(st.integers(0, 20))
        stopping.append(replace(request, stop=(unstopped.text[start : start + 2] or "zz", "never seen")))
    expected = decode_full(*stopping, stop_ids=stop_ids)
    engine = make_engine(Options(draft_length=length, chunk=32, seed=0), stop_ids=stop_ids)
    for got, plain in zip(decode(engine, *stopping), expected, strict=True):
        assert got.outcome == plain.outcome
        assert [told.token for told in got.logprobs] == [told.token for told in plain.logprobs]
        assert np.allclose([t.logprob for t in got.logprobs], [t.logprob for t in plain.logprobs], atol=1e-4)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accounts_and_flags_agree(class_name: str, temperature: float) -> None:
    engine = make_engine(Options(draft_length=3))
    got = decode(engine, make_request(class_name=class_name, temperature=temperature, seed=1, max_tokens=40))[0]
    flags = [flag for update in got.updates for flag in update.drafted]
    assert len(flags) == len(got.ids) == got.ran.tokens == 40
    assert got.ran.accepted == sum(flags) == sum(got.ran.accepted_at)
    assert got.ran.drafted > 3 * (got.ran.drafts - 2)
    assert not got.unverified
    assert got.ran.unverified == got.ran.divergent == 0
    if class_name == "pooled":
        assert got.ran.accepted > got.ran.drafted / 2
    if class_name == "stranger":
        assert got.ran.fallbacks > got.ran.drafts / 2


def dense_law(decoder_name: str, prefixes: torch.Tensor) -> np.ndarray:
    """float64 [R, V] next-token law of a graph after each prefix [R, n], without the engine."""
    decoder = graphs()[decoder_name]
    rows, length = prefixes.shape
    positions = torch.arange(length).repeat(rows)
    streams = decoder.streams(prefixes.flatten(), positions, DenseAttend(rows, length))
    return decoder.logits(streams.view(rows, length, -1)[:, -1]).softmax(-1).double().numpy()


def bins(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Tokens in four groups of about equal probability under p, from the draft's favourites to what it neglects."""
    order = np.argsort(np.log(p / q))
    groups = np.empty(len(p), dtype=int)
    groups[order] = np.minimum((np.cumsum(p[order]) * 4).astype(int), 3)
    return groups


@pytest.mark.parametrize("class_name", ["lame", "stranger"])
def test_unseeded_law(class_name: str) -> None:
    """The first two tokens' joint law, both drafted by a bad draft, by a chi-square test."""
    prompt = 7
    first, first_draft = (dense_law(name, torch.tensor([[prompt]]))[0] for name in ("full", class_name))
    prefixes = torch.stack([torch.full((VOCABULARY,), prompt), torch.arange(VOCABULARY)], 1)
    second, second_draft = (dense_law(name, prefixes) for name in ("full", class_name))
    one, two = bins(first, first_draft), bins(first @ second, first @ second_draft)
    law = np.zeros((4, 4))
    for token in range(VOCABULARY):
        law[one[token]] += first[token] * np.bincount(two, second[token], 4)
    engine = make_engine(Options(draft_length=2, max_running=100, max_waiting=4000, seed=5), blocks=100)
    request = make_request([prompt], class_name=class_name, temperature=1.0, max_tokens=4)
    counts = np.zeros((4, 4))
    for got in decode(engine, *[request] * 2000):
        counts[one[got.ids[0]], two[got.ids[1]]] += 1
    assert chisquare(counts.ravel(), law.ravel() / law.sum() * counts.sum()).pvalue > 1e-3


def test_unseeded_requests_differ() -> None:
    request = make_request(temperature=1.0, max_tokens=12)
    one, two = decode(make_engine(), request, request)
    assert one.ids != two.ids
