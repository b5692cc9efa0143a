"""Log-probabilities are the full model's own, of the text and of the prompt, drafts or none, however it is chunked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.engine.options import Options
from server.engine.request import Mode
from strace import native
from strace.decoder import DenseAttend
from tests.server.engine.harness import decode, graphs, make_engine, make_request, make_runner

NATIVE = pytest.mark.skipif(not native.available(), reason=str(native.why_unavailable()))
PROMPT = [(7 * i) % 251 for i in range(70)]


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.EXACT, Mode.ROUTED])
@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=NATIVE)])
def test_they_are_the_full_models(mode: Mode, length: int | None, kind: str) -> None:
    request = make_request(PROMPT, mode, max_tokens=20, temperature=0.8, seed=3, repetition_penalty=1.2, threshold=0.0)
    request = replace(request, logprobs=2, prompt_logprobs=True)
    (got,) = decode(make_engine(Options(draft_length=length, chunk=32), runner=make_runner(kind=kind)), request)
    ids = [*PROMPT, *got.ids]
    full = graphs()["full"]
    streams = full.streams(torch.tensor(ids), torch.arange(len(ids)), DenseAttend(1, len(ids)))
    rows = full.logits(streams).float().log_softmax(1)
    told = [each for update in got.updates for each in update.prompt_logprobs] + got.logprobs
    assert [each.token for each in told] == ids[1:]
    for row, each in zip(rows, told, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=2e-3)
        assert [logprob for _, logprob in each.best] == pytest.approx(row.topk(2).values.tolist(), abs=2e-3)
    assert got.ran.unverified == 0


def test_none_unless_asked_for() -> None:
    (got,) = decode(make_engine(), make_request())
    assert not got.logprobs
