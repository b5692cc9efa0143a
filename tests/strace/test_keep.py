"""Keeping units: the best ones, within the bytes, and cut out so that they compute what they computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Decoder, DenseAttend, normalise_heads
from strace.flow import Flow
from strace.keep import Kept, Plan, fit_size, full_bytes, keep_units, kept_bytes, slice_decoder
from tests.tiny import KINDS, random_tokens, save_tiny


def make_flow(seed: int, layers: int = 3, groups: int = 2, neurons: int = 96) -> Flow:
    g = torch.Generator().manual_seed(seed)
    scores = (torch.rand(layers, n, generator=g, dtype=torch.float64) for n in (groups, neurons))
    return Flow(*scores, levels=torch.ones(2 * layers + 1))


@pytest.fixture(params=KINDS)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    extra = {"sliding_window": 7} if request.param == "mistral" else {}
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path, request.param, **extra))), "fp32")


def logits(decoder: Decoder, n: int = 20, tap: object = None) -> Tensor:
    tokens = random_tokens(n)
    extra = () if tap is None else (tap,)
    return decoder.logits(decoder.streams(tokens, torch.arange(n), DenseAttend(1, n), *extra))


@given(st.integers(0, 50), st.sampled_from([0.0, 1 / 3, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 1 / 3, 0.5, 1.0]))
def test_no_dropped_group_scores_above_a_kept_one(seed: int, attention: float, mlp: float) -> None:
    flow = make_flow(seed)
    kept = keep_units(flow, Plan("p", attention, mlp))
    chosen = torch.zeros_like(flow.groups, dtype=torch.bool)
    for l, groups in enumerate(kept.groups):
        chosen[l, groups] = True
    assert int(chosen.sum()) == round(attention * 6)
    if 0 < chosen.sum() < 6:
        assert flow.groups[chosen].min() >= flow.groups[~chosen].max()
    assert sum(map(len, kept.neurons)) == 32 * round(mlp * 9)
    for l, neurons in enumerate(kept.neurons):
        rest = torch.ones(96, dtype=torch.bool)
        rest[neurons] = False
        assert neurons.equal(neurons.sort().values)
        assert not len(neurons) or not rest.any() or flow.neurons[l, neurons].min() >= flow.neurons[l, rest].max()


def test_whole_sublayers_go_by_their_sum() -> None:
    flow = make_flow(1)
    flow.groups[1] = 0
    flow.neurons[2] = 0
    kept = keep_units(flow, Plan("p", 2 / 3, 2 / 3, whole=True))
    assert [len(g) for g in kept.groups] == [2, 0, 2]
    assert [len(n) for n in kept.neurons] == [96, 96, 0]


def test_a_last_block_that_is_not_full_competes_too() -> None:
    flow = make_flow(3, neurons=40)
    kept = keep_units(flow, Plan("p", mlp=1.0))
    assert [len(n) for n in kept.neurons] == [40, 40, 40]


def kept_units(flow: Flow | None = None) -> Kept:
    return keep_units(flow or make_flow(5), Plan("p", 0.5, 0.5), torch.arange(0, 300, 2))


def test_a_slice_equals_the_full_model_with_the_other_units_silenced(full: Decoder) -> None:
    kept = replace(kept_units(), neurons=(torch.arange(96), torch.arange(10, 42), torch.arange(0)))
    if full.spec.family == "olmo2":  # its norm over all heads makes a slice of some of them an approximation
        kept = replace(kept, groups=(torch.arange(2), torch.arange(0), torch.arange(2)))

    def silence(name: str, layer: int, value: Tensor) -> Tensor:
        if name == "z":
            heads = value.view(len(value), 2, -1)
            return torch.stack([heads[:, g] * (g in kept.groups[layer]) for g in range(2)], 1).flatten(1)
        if name == "act":
            return value * torch.isin(torch.arange(96), kept.neurons[layer])
        return value

    for layer, groups, neurons in zip(full.layers, kept.groups, kept.neurons, strict=True):
        # A dropped sublayer drops its bias, too; random biases would show that and nothing else.
        for linear in ([layer.attention.o] if not len(groups) else []) + ([layer.mlp.down] if not len(neurons) else []):
            linear.bias = None
    assert kept.token_ids is not None
    wanted = logits(full, tap=silence)[:, kept.token_ids]
    torch.testing.assert_close(logits(slice_decoder(full, kept)), wanted, rtol=1e-4, atol=1e-4)


def test_a_norm_over_all_heads_keeps_those_of_the_kept_ones(tmp_path: Path) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path, "olmo2"))), "fp32")
    kept = Kept((torch.tensor([1]),) * 3, (torch.arange(96),) * 3)
    whole, part = full.layers[0].attention, slice_decoder(full, kept).layers[0].attention
    assert torch.equal(part.q_norm.weight, whole.q_norm.weight[32:])
    assert torch.equal(part.k_norm.weight, whole.k_norm.weight[16:])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    q = (x @ whole.qkv.dense()[32:64].T).view(5, 2, 16)
    wanted = q / (q.square().mean((1, 2), keepdim=True) + full.spec.norm_eps).sqrt() * part.q_norm.weight.view(2, 16)
    torch.testing.assert_close(normalise_heads(q, part.q_norm), wanted)


def test_keeping_everything_is_the_full_model(full: Decoder) -> None:
    kept = keep_units(make_flow(0), Plan("p"))
    whole = slice_decoder(full, kept)
    assert torch.equal(logits(whole), logits(full))
    assert whole.layers[0].attention is full.layers[0].attention
    assert whole.embed is full.embed


@pytest.mark.parametrize("format", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox"])
def test_bytes_are_those_of_the_decoder(tmp_path: Path, family: str, format: str) -> None:
    extra = {"attention_bias": False} if family == "gpt_neox" else {}
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path, family, **extra))), "bf16")
    for layer in full.layers:  # biases are not counted
        layer.mlp.inner.bias = layer.mlp.down.bias = None
    kept = kept_units()
    built = quantise_decoder(slice_decoder(full, kept), format)
    linears = [p for l in built.layers for p in ([l.attention.qkv, l.attention.o] if l.attention else [])]
    linears += [p for l in built.layers for p in ([l.mlp.inner, l.mlp.down] if l.mlp else [])]
    assert kept_bytes(full.spec, kept, format) == sum(p.bytes for p in [*linears, built.head])
    assert abs(full_bytes(full) / full.bytes_per_step - 1) < 0.05


@given(st.integers(0, 20), st.floats(0.05, 1.0), st.booleans(), st.sampled_from([0.5, 1.0]))
def test_a_size_is_kept_and_used(seed: int, size: float, whole: bool, attention: float) -> None:
    flow, budget = make_flow(seed), size * 2 * 150_000
    plan = fit_size(Plan("p", attention=attention, whole=whole), flow, _SPEC, None, budget)
    if plan is None:
        assert kept_bytes(_SPEC, keep_units(flow, Plan("p", attention, 0.0, whole)), "int4") > budget
        return
    assert plan.attention == attention
    assert kept_bytes(_SPEC, keep_units(flow, plan), "int4") <= budget
    if plan.mlp < 1:
        more = replace(plan, mlp=plan.mlp + 1 / 64)
        assert kept_bytes(_SPEC, keep_units(flow, more), "int4") > budget


def _make_spec() -> object:
    from strace.families import read_spec
    from tests.tiny import make_tiny

    return read_spec(make_tiny().config)


_SPEC = _make_spec()
