"""Edge weights: the exact shortcut, and the sums that the method promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend
from strace.edges import Edges, PatternAttend, layer_edges
from tests.tiny import KINDS, random_tokens, save_tiny

SHAPE = (2, 24)


@pytest.fixture(params=KINDS)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    extra = {"sliding_window": 7} if request.param == "mistral" else {}
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path, request.param, **extra))), "fp32")


def stream_before(full: Decoder, l: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    positions = torch.arange(SHAPE[1]).repeat(SHAPE[0])
    rotation = full.rotation(positions)
    x = full.embedded(random_tokens(SHAPE[0] * SHAPE[1]), positions)
    for i in range(l):
        x = full.layer(i, x, rotation, DenseAttend(*SHAPE))
    return x, rotation


def edges_of(full: Decoder, l: int) -> Edges:
    x, rotation = stream_before(full, l)
    return layer_edges(full, l, x, rotation, SHAPE)


def test_weights_into_every_node_sum_to_one(full: Decoder) -> None:
    edges = edges_of(full, 1)
    assert (edges.mlp_residual is None) == full.spec.parallel
    mixed = edges.attention.sum((1, 3)) + edges.attention_residual
    into = [mixed + edges.mlp] if edges.mlp_residual is None else [mixed, edges.mlp + edges.mlp_residual]
    for total in into:
        torch.testing.assert_close(total, torch.ones(SHAPE))
    assert edges.neurons is not None
    torch.testing.assert_close(edges.neurons.sum(1), torch.ones(SHAPE[0] * SHAPE[1]))


def vectors(full: Decoder, l: int, attend: PatternAttend) -> tuple[Tensor, Tensor | float]:
    """Every attention edge's vector, [S, H, n, n, hidden], and what the bias adds, [S, n, hidden], the long way."""
    part = full.layers[l].attention
    assert part is not None
    per_head = part.o.dense().view(full.spec.hidden, part.heads, -1)
    v = attend.v.repeat_interleave(full.spec.group, 1)
    z = attend.alpha[..., None] * torch.einsum("dhe,shje->shjd", per_head, v)[:, :, None]
    bias = torch.zeros(full.spec.hidden) if part.o.bias is None else part.o.bias
    if part.post_norm is None:
        return z, bias
    rms = ((z.sum((1, 3)) + bias).square().mean(-1, keepdim=True) + full.spec.norm_eps).sqrt()
    gamma = part.post_norm.weight
    return z * gamma / rms[:, None, :, None], bias * gamma / rms


def test_vectors_into_a_node_sum_to_it_and_the_shortcut_is_their_norm(full: Decoder) -> None:
    x, rotation = stream_before(full, 1)
    attend, part = PatternAttend(*SHAPE), full.layers[1].attention
    assert part is not None
    added = full.attention(1, x, rotation, attend)
    assert added is not None
    z, bias = vectors(full, 1, attend)
    total = (z.sum((1, 3)) + bias).flatten(0, 1)
    assert float((total - added).norm() / added.norm()) < 1e-5
    edges, whole = edges_of(full, 1), x.abs().sum(-1).view(SHAPE)
    # Over the residual's weight the weights are the norms themselves, whatever else leads to the node.
    norms = edges.attention / edges.attention_residual[:, None, :, None] * whole[:, None, :, None]
    torch.testing.assert_close(norms, z.abs().sum(-1), rtol=1e-4, atol=1e-4)


def test_weights_are_shares_of_l1_norms(full: Decoder) -> None:
    x, rotation = stream_before(full, 2)
    attend = PatternAttend(*SHAPE)
    added = full.attention(2, x, rotation, attend)
    assert added is not None
    norms, residual = vectors(full, 2, attend)[0].abs().sum(-1), x.abs().sum(-1).view(SHAPE)
    mlp = full.mlp(2, x if full.spec.parallel else x + added)
    assert mlp is not None
    passed = mlp.abs().sum(-1).view(SHAPE)
    whole = norms.sum((1, 3)) + residual + (passed if full.spec.parallel else 0)
    edges = edges_of(full, 2)
    torch.testing.assert_close(edges.attention, norms / whole[:, None, :, None])
    torch.testing.assert_close(edges.attention_residual, residual / whole)
    after = whole if full.spec.parallel else passed + (x + added).abs().sum(-1).view(SHAPE)
    torch.testing.assert_close(edges.mlp, passed / after)


def test_a_neuron_weighs_what_it_adds(full: Decoder) -> None:
    x, rotation = stream_before(full, 0)
    seen: dict[str, Tensor] = {}
    full.layer(0, x, rotation, DenseAttend(*SHAPE), lambda name, l, value: seen.setdefault(name, value))
    part, edges = full.layers[0].mlp, edges_of(full, 0)
    assert part is not None
    gamma = 1 if part.post_norm is None else part.post_norm.weight
    norms = torch.stack([(seen["act"][:, k, None] * part.down.dense()[:, k] * gamma).abs().sum(-1) for k in range(96)])
    torch.testing.assert_close(edges.neurons, (norms / norms.sum(0)).T)


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_bias_before_a_post_norm_has_no_weight_but_counts_in_its_scale(tmp_path: Path, family: str) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path, family, attention_bias=True))), "fp32")
    assert full.layers[1].attention.o.bias is not None
    test_vectors_into_a_node_sum_to_it_and_the_shortcut_is_their_norm(full)
    test_weights_are_shares_of_l1_norms(full)


def test_no_edge_from_the_future_or_from_outside_the_window(full: Decoder) -> None:
    distance = torch.arange(SHAPE[1])[:, None] - torch.arange(SHAPE[1])
    part = full.layers[0].attention
    assert part is not None
    reach = distance >= 0 if part.window is None else (distance >= 0) & (distance < part.window)
    weights = edges_of(full, 0).attention
    assert not weights[..., ~reach].any()
    assert (weights[..., reach] > 0).all()


def test_a_dropped_sublayer_leaves_the_residual_alone(full: Decoder) -> None:
    full.layers[1].attention = full.layers[1].mlp = None
    edges = edges_of(full, 1)
    assert edges.neurons is None
    assert not edges.attention.numel()
    assert torch.equal(edges.attention_residual, torch.ones(SHAPE))
    assert not edges.mlp.any()
    assert edges.mlp_residual is None if full.spec.parallel else torch.equal(edges.mlp_residual, torch.ones(SHAPE))


def test_pattern_attention_gives_what_dense_attention_gives(full: Decoder) -> None:
    x, rotation = stream_before(full, 0)
    wanted = full.attention(0, x, rotation, DenseAttend(*SHAPE))
    torch.testing.assert_close(full.attention(0, x, rotation, PatternAttend(*SHAPE)), wanted, rtol=1e-4, atol=1e-5)
