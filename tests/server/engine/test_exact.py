"""`exact` gives the full model's text: token for token with a seed or greedily, in distribution without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.engine.options import Options
from server.engine.request import Mode, Request
from strace import native, sampling
from strace.decoder import DenseAttend
from strace.draft import Draft, DraftPlan
from strace.kv import Batch
from strace.runner import Runner
from strace.sampling import SamplingParams, process
from tests.server.engine.harness import (
    decode,
    decode_full,
    graphs,
    make_engine,
    make_request,
    make_runner,
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


# What makes each parameter matter to a text of the tiny model; ids 64 to 90 are letters.
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 9},
    "min_p": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.5},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "logit_bias": {"logit_bias": tuple((id, 9.0) for id in range(64, 91))},
    "stop": {"stop": ("a", "e", "日", "t")},
    "stop_ids": {"stop_ids": tuple(range(70, 120))},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {"min_tokens": 7},
    "max_tokens": {"max_tokens": 9},
    "logprobs": {"logprobs": 2, "prompt_logprobs": True},
    "max_draft": {"max_draft": 2},
}


def shape(*names: str) -> Request:
    """A seeded request with some of the parameters."""
    change = {name: value for each in names for name, value in PARAMETERS[each].items()}
    sampling_names = SamplingParams.__dataclass_fields__
    params = SamplingParams(seed=len(str(names)), **{n: v for n, v in change.items() if n in sampling_names})
    rest = {n: v for n, v in change.items() if n not in sampling_names}
    return replace(Request("r", [7, 8, 9, 7], params, 24), **rest)


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("class_name", ["lame", "stranger"])
def test_every_parameter_and_pair(class_name: str, kind: str) -> None:
    """Seeded, with drafts that are half right or never: the text of plain decoding, whatever two parameters meet."""
    pairs = [shape(a, b) for a in PARAMETERS for b in PARAMETERS if a <= b]
    stop_ids = range(180, 220)
    engine = make_engine(Options(draft_length=3, max_waiting=len(pairs)), stop_ids=stop_ids, runner=load(kind))
    drafted = decode(engine, *(replace(r, mode=Mode.EXACT, class_name=class_name) for r in pairs))
    engine = make_engine(Options(max_waiting=len(pairs)), stop_ids=stop_ids, runner=load(kind))
    plain = decode(engine, *(replace(r, mode=Mode.FULL) for r in pairs))
    for request, got, expected in zip(pairs, drafted, plain, strict=True):
        assert got.outcome == expected.outcome, request
    assert {got.finish for got in plain} == {"stop", "length"}


def test_every_sampling_parameter_is_among_them() -> None:
    assert SamplingParams.__dataclass_fields__.keys() - PARAMETERS.keys() == {"seed"}


SETTINGS: dict[str, tuple[str, Request]] = {
    "plain": ("lame", make_request(temperature=1.0)),
    "top_p": ("stranger", make_request(temperature=0.7, top_p=0.9)),
    "top_k, min_p": ("lame", make_request(temperature=1.0, top_k=20, min_p=0.02)),
    "penalties": (
        "stranger",
        make_request(temperature=1.0, presence_penalty=0.9, frequency_penalty=0.5, repetition_penalty=1.3),
    ),
    "bias, min_tokens": (
        "lame",
        replace(
            make_request(temperature=1.3, logit_bias=((5, 3.0), (260, -100.0))), stop_ids=(7, 11, 100), min_tokens=4
        ),
    ),
}
PROMPT, TEXTS = 7, 1200


def rows_of(decoder_name: str, texts: torch.Tensor, request: Request) -> torch.Tensor:
    """float64 [N, 3, V]: a graph's distributions of the three tokens of texts [N, 3], without the engine."""
    decoder, (n, _) = graphs()[decoder_name], texts.shape
    before = torch.cat([torch.full((n, 1), PROMPT), texts[:, :2]], 1)
    streams = decoder.streams(before.flatten(), torch.arange(3).repeat(n), DenseAttend(n, 3))
    logits = decoder.logits(streams)
    logits[:, list(request.stop_ids)] = -torch.inf
    histories = [text[:i] for text in texts.tolist() for i in range(3)]
    return process(logits, histories, request.params, [PROMPT]).double().view(n, 3, -1)


def sample(setting: str, runner: Runner) -> float:
    """The p-value of 1,200 sampled texts of three drafted tokens under the full model's law, by a chi-square test.

    Each token becomes the probability, under the full model after the same text, of what the draft favours more, the
    token's own in a random part: a uniform number, whatever came before, if and only if the law is right.
    """
    class_name, request = SETTINGS[setting]
    request = replace(request, prompt=[PROMPT], class_name=class_name, max_tokens=4)
    options = Options(draft_length=3, max_running=100, max_waiting=TEXTS, seed=5, prefix_cache=False)
    engine = make_engine(options, runner=runner)
    texts = torch.tensor([got.ids[:3] for got in decode(engine, *[request] * TEXTS)])
    p, q = (rows_of(name, texts, request) for name in ("full", class_name))
    favour = (q / p).nan_to_num(nan=0.0)
    own = favour.gather(2, texts[:, :, None])
    assert (p.gather(2, texts[:, :, None]) > 0).all()
    before, beside = (p * (favour > own)).sum(2), (p * (favour == own)).sum(2)
    places = before + beside * torch.rand(texts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cells = (places * 4).long().clamp(0, 3) @ torch.tensor([16, 4, 1])
    return float(chisquare(np.bincount(cells.numpy(), minlength=64)).pvalue)


def load(kind: str) -> Runner:
    if kind == "native" and not native.available():
        pytest.skip(str(native.why_unavailable()))
    return make_runner(200, kind)


@pytest.mark.parametrize(
    ("setting", "kind"), [*((name, "native") for name in SETTINGS), ("plain", "torch"), ("bias, min_tokens", "torch")]
)
def test_unseeded_law(setting: str, kind: str) -> None:
    assert sample(setting, load(kind)) > 1e-3


def test_a_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    assert sample("plain", load("torch")) < 1e-6


class Withdrawing:
    """A runner that drops a drawn token of low confidence, and what follows it, before the full model sees it."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        return [cut_unsure(draft) for draft in self.inner.draft(graph, batch, plan)]


def cut_unsure(draft: Draft) -> Draft:
    assert draft.q is not None
    sure = [float(row[token]) > 0.3 * float(row.max()) for row, token in zip(draft.q, draft.tokens, strict=True)]
    n = [*sure, False].index(False)
    return Draft(draft.tokens[:n], draft.confidence[:n], draft.q[:n])


def test_a_withdrawn_token_is_noticed() -> None:
    assert sample("top_k, min_p", Withdrawing(load("native"))) < 1e-6  # type: ignore[arg-type]


def test_unseeded_requests_differ() -> None:
    request = make_request(temperature=1.0, max_tokens=12)
    one, two = decode(make_engine(), request, request)
    assert one.ids != two.ids
