"""Edge weights of tiny models: vectors sum to their node, weights to 1, the shortcut equals explicit norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder
from strace.edges import PatternAttend
from strace.extract import EdgeWeights, Traces, count_edges, pairs
from strace.families import UnsupportedModel
from strace.importance import MEASURES, weigh_edges
from tests.tiny import KINDS, random_tokens, save_tiny

SEQUENTIAL = sorted(set(KINDS) - {"gpt_neox"})  # families of two steps a layer
OPTIONS: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True}, "mistral": {"sliding_window": None}}


def load(folder: Path, family: str) -> Decoder:
    return load_decoder(open_checkpoint(str(save_tiny(folder, family, **OPTIONS.get(family, {})))), "fp32")


@pytest.fixture(params=SEQUENTIAL)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    return load(tmp_path, request.param)


def explicit(decoder: Decoder, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Of every layer the vectors of all edges, [H, T, T, hidden] for attention, and the nodes that they lead to."""
    layers: list[dict[str, Tensor]] = []
    attend = PatternAttend(1, len(tokens))

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        if name == "stream":
            layers.append({})
        if name == "attention_out":
            part = decoder.layers[layer].attention
            assert part is not None
            values = attend.v[0].repeat_interleave(part.heads // part.kv_heads, 0)
            vectors = torch.einsum("htd,ohd->hto", values, part.o.dense().view(value.shape[1], part.heads, -1))
            edges = attend.alpha[0][..., None] * vectors[:, None]
            bias = torch.zeros(value.shape[1]) if part.o.bias is None else part.o.bias
            if part.post_norm is not None:
                whole = edges.sum((0, 2)) + bias
                scale = part.post_norm.weight / (whole.square().mean(-1, keepdim=True) + part.post_norm.eps).sqrt()
                edges, bias = edges * scale[:, None], bias * scale
            layers[-1] |= {"edges": edges, "bias": bias}
        if name in ("stream", "stream_mid", "mlp_out", "stream_out"):
            layers[-1][name] = value
        return value

    with torch.inference_mode():
        decoder.streams(tokens, torch.arange(len(tokens)), attend, tap)
    return layers


def sums(weights: EdgeWeights) -> Tensor:
    """[steps, T]: the weights into each node, added up."""
    rows, _ = pairs(weights.tokens)
    found = []
    for step in weights.steps:
        total = step.residual.astype(np.float64)
        if step.attention is not None:
            there = np.where(step.attention > -np.inf, step.attention, 0)
            total = total + np.bincount(rows, there.sum(0, dtype=np.float64), weights.tokens)
        found.append(torch.from_numpy(total if step.mlp is None else total + step.mlp))
    return torch.stack(found)


def test_vectors_into_a_node_sum_to_it(decoder: Decoder) -> None:
    for layer in explicit(decoder, random_tokens(9)):
        whole = layer["stream"] + layer["edges"].sum((0, 2)) + layer["bias"]
        error = (whole - layer["stream_mid"]).norm(dim=-1) / layer["stream_mid"].norm(dim=-1)
        assert error.max() < 1e-5
        error = (layer["stream_mid"] + layer["mlp_out"] - layer["stream_out"]).norm(dim=-1)
        assert (error / layer["stream_out"].norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_weights_into_a_node_sum_to_one(decoder: Decoder, measure: str) -> None:
    weights = weigh_edges(decoder, random_tokens(11), measure)
    assert torch.allclose(sums(weights), torch.ones(2 * decoder.spec.layers, 11).double(), atol=1e-5)
    assert Traces(weights).total == count_edges(decoder.spec.layers, decoder.spec.heads, 11)


@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_weights_equal_those_of_the_explicit_vectors(decoder: Decoder, measure: str) -> None:
    tokens = random_tokens(8, seed=2)
    weights, layers = weigh_edges(decoder, tokens, measure), explicit(decoder, tokens)
    rows, columns = pairs(8)

    def score(vectors: Tensor, node: Tensor) -> Tensor:
        if measure == "l1":
            return vectors.abs().sum(-1)
        return (node.abs().sum(-1) - (node - vectors).abs().sum(-1)).clamp_min(0)

    for l, layer in enumerate(layers):
        for i in range(8):
            edges = layer["edges"][:, i, : i + 1].flatten(0, 1)
            into = score(torch.cat([layer["stream"][i : i + 1], edges]), layer["stream_mid"][i])
            into = (into / into.sum()).numpy()
            step = weights.steps[2 * l]
            assert step.attention is not None
            assert np.allclose(step.residual[i], into[0], atol=1e-6)
            assert np.allclose(step.attention[:, rows == i].ravel(), into[1:], atol=1e-6)
            both = torch.stack([layer["stream_mid"][i], layer["mlp_out"][i]])
            if (l, i) == (len(layers) - 1, 7):
                centre = both.mean(-1, keepdim=True) if decoder.final_norm.kind == "layer" else 0
                both = (both - centre) * decoder.final_norm.weight
            into = score(both, both.sum(0))
            step = weights.steps[2 * l + 1]
            assert step.mlp is not None
            assert np.allclose([step.residual[i], step.mlp[i]], (into / into.sum()).numpy(), atol=1e-6)
    assert (columns <= rows).all()


def test_the_final_norm_weighs_the_edges_into_the_output(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    decoder = load_decoder(open_checkpoint(str(tmp_path)), "fp32")
    tokens = random_tokens(6)
    weighed = weigh_edges(decoder, tokens).steps[-1]
    decoder.final_norm = replace(decoder.final_norm, weight=torch.ones_like(decoder.final_norm.weight))
    plain = weigh_edges(decoder, tokens).steps[-1]
    assert weighed.mlp is not None
    assert plain.mlp is not None
    assert weighed.mlp[-1] != plain.mlp[-1]
    assert np.array_equal(weighed.mlp[:-1], plain.mlp[:-1])


def test_a_sliding_window_has_no_edges_outside_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mistral", sliding_window=3)
    decoder = load_decoder(open_checkpoint(str(tmp_path)), "fp32")
    weights = weigh_edges(decoder, random_tokens(7))
    attention = weights.steps[0].attention
    assert attention is not None
    rows, columns = pairs(7)
    assert np.array_equal(np.isinf(attention[0]), rows - columns >= 3)
    assert torch.allclose(sums(weights), torch.ones(6, 7).double(), atol=1e-5)
    layers, heads = decoder.spec.layers, decoder.spec.heads
    assert Traces(weights).total < count_edges(layers, heads, 7)


def test_ifr_is_the_same_in_pieces(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(10)
    whole = weigh_edges(decoder, tokens, "ifr")
    monkeypatch.setattr("strace.importance._CHUNK", 1)
    pieces = weigh_edges(decoder, tokens, "ifr")
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        if one.attention is not None:
            assert other.attention is not None
            assert np.allclose(one.attention, other.attention, atol=1e-6)


def test_random_weights_are_the_models_shape_and_follow_the_seed(decoder: Decoder) -> None:
    tokens = random_tokens(5)
    one, same, other = (weigh_edges(decoder, tokens, "random", seed) for seed in (1, 1, 2))
    assert Traces(one).total == count_edges(decoder.spec.layers, decoder.spec.heads, 5)
    assert np.array_equal(one.steps[0].residual, same.steps[0].residual)
    assert not np.array_equal(one.steps[0].residual, other.steps[0].residual)


def test_bad_input_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"unknown importance 'l2'.*l1, ifr, random"):
        weigh_edges(decoder, random_tokens(3), "l2")
    for measure in MEASURES:
        with pytest.raises(ValueError, match="empty prompt"):
            weigh_edges(decoder, random_tokens(0), measure)


def test_parallel_blocks_are_refused_by_name(tmp_path: Path) -> None:
    decoder = load_decoder(open_checkpoint(str(save_tiny(tmp_path, "gpt_neox"))), "fp32")
    with pytest.raises(UnsupportedModel, match="gpt_neox"):
        weigh_edges(decoder, random_tokens(5))
