"""The law of one verified token in closed form: acceptance and residual together give the full model's distribution,
under every sampling parameter and every pair of them, as both runners shape it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace import native, sampling
from strace.runner import FULL
from strace.sampling import Noise, Sampler, SamplingParams
from tests.strace.native.passes import load_tiny, make_native

V = 12
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V)
PROMPT, HISTORY = [0, 3], [3, 5, 5]
POSITION = len(PROMPT) + len(HISTORY)
# The last id is never barred, biased away or left out of the draft's head, so something can always be drawn.
VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.3, 0.7, 1.9),
    "top_p": (0.0917, 0.5371, 0.9137),
    "top_k": (1, 2, 7),
    "min_p": (0.0123, 0.3217),
    "presence_penalty": (0.5, -1.25),
    "frequency_penalty": (0.25, -0.5),
    "repetition_penalty": (1.3, 0.8),
    "logit_bias": (((0, 2.5),), ((1, -100.0), (2, 1.0))),
    "min_tokens": (4, 6),
}


Shape = Callable[[Tensor, list[int], Sampler], Tensor]


@cache
def shapes() -> list[Shape]:
    """How each runner shapes logits, float32 [R, V], into distributions."""
    native_runner = [make_native({FULL: load_tiny()}, 1)] if native.available() else []
    return [lambda logits, drafts, sampler: sampler.process(logits, drafts), *(each.process for each in native_runner)]


def make_sampler(chosen: dict[str, Any]) -> Sampler:
    """A sampler behind `HISTORY`; ids 4 and 7 end the text."""
    least = chosen.get("min_tokens", 0)
    params = replace(SamplingParams(), **{name: value for name, value in chosen.items() if name != "min_tokens"})
    return Sampler(params, Noise(0, shared=False), POSITION, HISTORY, PROMPT, [4, 7], len(PROMPT) + least)


def output_law(p: Tensor, q: Tensor, withdraws: Callable[[int], bool] = lambda token: False) -> Tensor:
    """float64 [V]: the law of the token at a drafted position, from what `strace.sampling.verify` is made of.

    withdraws: says of a drawn token that it is dropped unseen, and the full model draws its own.
    """
    law = torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        drawn = float(q[token])
        if withdraws(token):
            law += drawn * p.double()
            continue
        stands = sampling.acceptance(p, q, token)
        law[token] += drawn * stands
        law += drawn * (1 - stands) * sampling.residual(p, q).double()
    return law


@pytest.mark.parametrize("name", VALUES)
@settings(max_examples=60)
@given(st.data())
def test_every_parameter_alone_and_with_each_other(name: str, data: st.DataObject) -> None:
    names = {name, data.draw(st.sampled_from(list(VALUES)), "beside")}
    sampler = make_sampler({each: data.draw(st.sampled_from(VALUES[each]), each) for each in sorted(names)})
    full, draft = (torch.tensor([data.draw(LOGITS, which)]) for which in ("full", "draft"))
    draft[:, list(data.draw(st.sets(st.integers(0, V - 2), max_size=V), "left out of the head"))] = -torch.inf
    for shape in shapes():
        p, q = (shape(logits.clone(), [], sampler)[0] for logits in (full, draft))
        assert float(p.sum()) == pytest.approx(1, abs=1e-6)
        assert (output_law(p, q) - p.double()).abs().max() <= 1e-6
        if "min_tokens" in names and sampler.barred_until > POSITION:
            assert not p[sampler.barred].any()


def far_apart() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(2, V, generator=generator).softmax(1)
    return p, q


def test_a_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = far_apart()
    assert (output_law(p, q) - p.double()).abs().max() <= 1e-6
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    assert (output_law(p, q) - p.double()).abs().max() > 1e-2


def test_a_withdrawn_token_is_noticed() -> None:
    """Dropping what was drawn without confidence looks safe, for the full model draws anew, but it is not."""
    p, q = far_apart()
    assert (output_law(p, q, lambda token: float(q[token]) < 0.1) - p.double()).abs().max() > 1e-2
