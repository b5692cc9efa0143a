"""Repair: the emulated serving regime is the real one, and fitting brings the stream nearer to the full model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace.blocks import LONGEST_BLOCK, even_starts, random_starts
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Decoder
from strace.flow import measure_flow
from strace.keep import Kept, Plan, keep_units, slice_decoder
from strace.kv import Batch
from strace.linear import quantise
from strace.measure import block_streams
from strace.repair import (
    DAMPING,
    March,
    Moments,
    Repair,
    Twins,
    as_dense,
    factor,
    fit_input,
    fit_output,
    invert,
    lower_factor,
    repair,
    round_second_order,
)
from strace.runner import FULL
from strace.texts import Texts, batch_texts
from tests.tiny import KINDS, make_runner, random_tokens, save_tiny, scatter_blocks


def load(folder: Path, family: str) -> Decoder:
    # The window is shorter than the texts and than two blocks, so that it cuts both parts of the keys.
    extra = {"sliding_window": 11} if family == "mistral" else {}
    return load_decoder(open_checkpoint(str(save_tiny(folder, family, **extra))), "fp32")


def make_texts(count: int, length: int, seed: int = 0) -> list[Texts]:
    return batch_texts([random_tokens(length, seed=1000 * seed + i).tolist() for i in range(count)])


def cut(full: Decoder, plan: Plan, fit: list[Texts]) -> Kept:
    return keep_units(measure_flow(full, fit[:1]), plan, torch.arange(0, 300, 2))


@pytest.mark.parametrize("family", KINDS)
def test_the_emulated_blocks_are_what_the_runner_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("strace.blocks.QUERIES", 13)  # 26 is the last of a block of 8, which a cut needs in full
    full = load(tmp_path, family)
    [batch] = batch_texts([random_tokens(45, seed=s).tolist() for s in (1, 2)])
    subgraph = slice_decoder(full, cut(full, Plan("p", 0.5, 0.5), [batch]))
    starts = random_starts(batch.shape, torch.Generator().manual_seed(3))
    assert len(set(starts[0].tolist())) > 4
    _, stream = block_streams(full, subgraph, batch, starts)
    emulated = torch.full((2, 45, 300), -torch.inf)
    emulated[..., subgraph.token_ids] = subgraph.logits(stream).view(2, 45, -1)
    runner = make_runner({FULL: full, "draft": subgraph})
    tables = scatter_blocks([45, 45], 32)
    for s in range(2):
        firsts = sorted(set(starts[s].tolist()))
        for start, end in zip(firsts, [*firsts[1:], 45], strict=True):
            batch_of = lambda a, b: Batch(batch.tokens[s, a:b].tolist(), [b - a], [a], tables[s : s + 1])  # noqa: B023, E731
            if start:
                before = max(f for f in firsts if f < start)
                runner.forward(FULL, batch_of(before, start), [0])
            served = runner.forward("draft", batch_of(start, end), list(range(end - start)))
            torch.testing.assert_close(emulated[s, start:end], served, rtol=1e-4, atol=1e-4)


def test_blocks_cover_texts_in_runs_of_one_to_eight() -> None:
    g = torch.Generator().manual_seed(0)
    for starts in (random_starts((20, 50), g), even_starts((20, 50), g)):
        depth = torch.arange(50) - starts
        assert (starts[:, 0] == 0).all()
        assert depth.min() == 0
        assert depth.max() == LONGEST_BLOCK - 1
        # A new block begins exactly where the depth returns to zero.
        assert torch.equal(depth[:, 1:] == 0, starts[:, 1:] != starts[:, :-1])
        assert ((depth[:, 1:] == 0) | (depth[:, 1:] == depth[:, :-1] + 1)).all()


@pytest.mark.parametrize("family", KINDS)
def test_keeping_all_leaves_weights_and_output_as_they_are(tmp_path: Path, family: str) -> None:
    full = load(tmp_path, family)
    fit, apart = make_texts(12, 60), make_texts(4, 60, seed=1)
    kept = keep_units(measure_flow(full, fit[:1]), Plan("p"))
    same = repair(full, kept, "bf16", fit, apart)
    for layer, was in zip(same.layers, full.layers, strict=True):
        torch.testing.assert_close(layer.attention.o.dense(), was.attention.o.dense(), rtol=0, atol=1e-3)
        torch.testing.assert_close(layer.mlp.down.dense(), was.mlp.down.dense(), rtol=0, atol=1e-3)
    # The stream of a random model is not small, hence relative.
    whole, own = block_streams(full, same, apart[0], even_starts(apart[0].shape, torch.Generator()))
    assert float((own - whole).norm() / whole.norm()) < 1e-3


def stream_error(full: Decoder, subgraph: Decoder, batches: list[Texts]) -> float:
    streams = [
        block_streams(full, subgraph, b, even_starts(b.shape, torch.Generator().manual_seed(0))) for b in batches
    ]
    return sum(float((own - whole).square().sum()) for whole, own in streams)


@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.parametrize("family", KINDS)
def test_repair_brings_the_stream_nearer_on_texts_apart(tmp_path: Path, family: str, format: str) -> None:
    full = load(tmp_path, family)
    fit, choose, apart = make_texts(24, 60), make_texts(6, 60, seed=1), make_texts(6, 60, seed=2)
    kept = cut(full, Plan("p", 0.5, 0.67), fit)
    sliced = slice_decoder(full, kept)
    rounded = quantise_decoder(sliced, "int4") if format == "int4" else sliced
    repaired = repair(full, kept, format, fit, choose)
    assert stream_error(full, repaired, apart) < 0.9 * stream_error(full, rounded, apart)
    assert torch.equal(repaired.token_ids, kept.token_ids)


@pytest.mark.parametrize("family", KINDS)
@torch.inference_mode()
def test_fitting_marches_on_the_streams_that_the_decoders_give(tmp_path: Path, family: str) -> None:
    full, fit = load(tmp_path, family), make_texts(6, 40)
    starts = random_starts(fit[0].shape, torch.Generator().manual_seed(0))
    stream = full.embedded(fit[0].tokens.flatten(), fit[0].positions)
    march = March(fit[0], starts, full.rotation(fit[0].positions), stream, stream, fitted_on=True)
    work = Repair(full, cut(full, Plan("p", 0.5, 0.67), fit), "bf16", [march])
    for l in range(3):
        work.attention(l)
        work.mlp(l)
    whole, own = block_streams(full, work.served, fit[0], starts)
    for marched, direct in ((march.full, whole), (march.own, own)):
        assert float((marched - direct).norm() / direct.norm()) < 1e-5


def test_dropped_sublayers_stay_dropped(tmp_path: Path) -> None:
    full = load(tmp_path, "llama")
    fit = make_texts(6, 40)
    kept = cut(full, Plan("p", 2 / 3, 1 / 3, whole=True), fit)
    repaired = repair(full, kept, "int4", fit, fit)
    assert sum(layer.attention is None for layer in repaired.layers) == 1
    assert sum(layer.mlp is None for layer in repaired.layers) == 2


def moments_of(x: Tensor, r: Tensor) -> Moments:
    moments = Moments(x.shape[1], r.shape[1], torch.device("cpu"))
    for part in range(2):
        moments.add(x[part::2], r[part::2])
    return moments


def correlated(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of uneven, correlated size, and a weight."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=g) * torch.logspace(0, -2, 64)
    return torch.randn(rows, 64, generator=g) @ mixing.T + 1, torch.randn(16, 64, generator=g)


@given(st.integers(1, 70), st.integers(0, 1000))
def test_matrices_are_inverted_and_factored_in_their_own_memory(size: int, seed: int) -> None:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = x.T @ x + torch.eye(size, dtype=torch.float64)
    lower, inverse = lower_factor(first := matrix.clone()), invert(second := matrix.clone())
    assert (lower.data_ptr(), inverse.data_ptr()) == (first.data_ptr(), second.data_ptr())
    torch.testing.assert_close(lower @ lower.T, matrix)
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64))
    upper, damped = factor(matrix), matrix + DAMPING * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    squares = upper @ damped @ upper.T  # the inverse is upper.T @ diagonal @ upper
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(squares, torch.diag(squares.diagonal()))


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_second_order_rounding_errs_less_on_its_inputs_than_plain(seed: int) -> None:
    x, weight = correlated(512, seed)
    moments = moments_of(x, torch.zeros(512, 0))
    wanted = x @ weight.T
    plain = (x @ quantise(weight, "int4").dense().T - wanted).square().sum()
    second = (x @ round_second_order(weight.double(), factor(moments.inputs)).dense().T - wanted).square().sum()
    assert second < 0.7 * plain


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_errors_and_biases_from_moments_are_those_of_the_rows(seed: int) -> None:
    x, weight = correlated(300, seed)
    r = x @ weight.T + torch.randn(300, 16) + 3
    moments = moments_of(x, r)
    bias = moments.bias(0.9 * weight)
    residual = r - x @ (0.9 * weight).T
    torch.testing.assert_close(bias.float(), residual.mean(0), rtol=1e-3, atol=1e-3)
    direct = float((residual - bias.float()).square().sum(1).mean())
    assert moments.error(0.9 * weight, bias) == pytest.approx(direct, rel=1e-3)


def test_a_fit_finds_the_weights_that_made_the_outputs() -> None:
    x, weight = correlated(2000, 4)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    r = x @ weight.T + 2
    fitted, bias = fit_output(weight + 0.3, moments_of(x[:1500], r[:1500]), moments_of(x[1500:], r[1500:]), "bf16")
    assert isinstance(fitted, Tensor)
    assert float((fitted - weight).norm() / weight.norm()) < 0.05
    assert float((bias - 2).abs().max()) < 0.5


def test_a_fit_that_does_not_hold_apart_is_not_taken() -> None:
    x, weight = correlated(400, 5)
    noise = 30 * torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    few, many = moments_of(x[:40], x[:40] @ weight.T + noise), moments_of(x[40:], x[40:] @ weight.T)
    fitted, _ = fit_output(weight, few, many, "bf16")
    torch.testing.assert_close(fitted, weight.double())


def twins_of(own: Tensor, full: Tensor) -> Twins:
    twins = Twins(own.shape[1], torch.device("cpu"))
    for part in range(2):
        twins.add(own[part::2], full[part::2])
    return twins


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(["int8", "int4"]))
def test_a_fitted_input_gives_more_of_what_the_full_stream_would(seed: int, format: str) -> None:
    full, weight = correlated(1200, seed)
    g = torch.Generator().manual_seed(seed)
    # What the own stream lacks can be told from the rest of it: the full inputs are correlated.
    own = full * (torch.rand(64, generator=g) > 0.3) + 0.05 * torch.randn(full.shape, generator=g)
    fitted = fit_input(weight, twins_of(own[:800], full[:800]), twins_of(own[800:1000], full[800:1000]), format)
    wanted = full[1000:] @ weight.T
    plain = (own[1000:] @ quantise(weight, format).dense().T - wanted).square().sum()
    assert (own[1000:] @ as_dense(fitted).T - wanted).square().sum() < 0.7 * plain


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_an_input_fit_that_does_not_hold_apart_is_not_taken(seed: int) -> None:
    full, weight = correlated(400, seed)
    few = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    fitted = fit_input(weight, twins_of(full[:40], 30 * few), twins_of(full[40:], full[40:]), "int8")
    torch.testing.assert_close(fitted.dense(), quantise(weight, "int8").dense())


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_errors_from_twins_differ_as_those_of_the_rows(seed: int) -> None:
    full, weight = correlated(300, seed)
    own = full + torch.randn(full.shape, generator=torch.Generator().manual_seed(seed))
    twins = twins_of(own, full)
    direct = [float((own @ (scale * weight).T - full @ weight.T).double().square().sum()) for scale in (0.9, 0.7)]
    assert twins.error(0.9 * weight, weight) - twins.error(0.7 * weight, weight) == pytest.approx(
        direct[0] - direct[1], rel=1e-3
    )
