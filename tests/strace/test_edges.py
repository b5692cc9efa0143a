"""Edge weights: the exact shortcut, and the sums that the method promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend
from strace.edges import Edges, PatternAttend, layer_edges, value_norms
from tests.tiny import random_tokens, save_tiny

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SHAPE = (2, 24)


@pytest.fixture(params=FAMILIES)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    extra = {"sliding_window": 7} if request.param == "mistral" else {}
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path, request.param, **extra))), "fp32")


def stream_before(full: Decoder, l: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    positions = torch.arange(SHAPE[1]).repeat(SHAPE[0])
    rotation = full.rotation(positions)
    x = full.embed[random_tokens(SHAPE[0] * SHAPE[1])].float()
    for i in range(l):
        x = full.layer(i, x, rotation, DenseAttend(*SHAPE))
    return x, rotation


def edges_of(full: Decoder, l: int) -> Edges:
    x, rotation = stream_before(full, l)
    return layer_edges(full, l, x, rotation, SHAPE)


def test_weights_into_every_node_sum_to_one(full: Decoder) -> None:
    edges = edges_of(full, 1)
    torch.testing.assert_close(edges.attention.sum((1, 3)) + edges.attention_residual, torch.ones(SHAPE))
    torch.testing.assert_close(edges.mlp + edges.mlp_residual, torch.ones(SHAPE))
    assert edges.neurons is not None
    torch.testing.assert_close(edges.neurons.sum(1), torch.ones(SHAPE[0] * SHAPE[1]))


def vectors(full: Decoder, l: int, attend: PatternAttend) -> Tensor:
    """Every attention edge's vector, [S, H, n, n, hidden], the long way."""
    part = full.layers[l].attention
    assert part is not None
    per_head = part.o.dense().view(full.spec.hidden, part.heads, -1)
    v = attend.v.repeat_interleave(full.spec.group, 1)
    return attend.alpha[..., None] * torch.einsum("dhe,shje->shjd", per_head, v)[:, :, None]


def test_vectors_into_a_node_sum_to_it_and_the_shortcut_is_their_norm(full: Decoder) -> None:
    x, rotation = stream_before(full, 1)
    attend, part = PatternAttend(*SHAPE), full.layers[1].attention
    assert part is not None
    added = full.attention(1, x, rotation, attend)
    assert added is not None
    z = vectors(full, 1, attend)
    total = z.sum((1, 3)).flatten(0, 1) + (0 if part.o.bias is None else part.o.bias)
    assert float((total - added).norm() / added.norm()) < 1e-5
    torch.testing.assert_close(attend.alpha * value_norms(part, attend.v)[:, :, None], z.abs().sum(-1))


def test_weights_are_shares_of_l1_norms(full: Decoder) -> None:
    x, rotation = stream_before(full, 2)
    attend = PatternAttend(*SHAPE)
    full.attention(2, x, rotation, attend)
    norms, residual = vectors(full, 2, attend).abs().sum(-1), x.abs().sum(-1).view(SHAPE)
    whole = norms.sum((1, 3)) + residual
    edges = edges_of(full, 2)
    torch.testing.assert_close(edges.attention, norms / whole[:, None, :, None])
    torch.testing.assert_close(edges.attention_residual, residual / whole)


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
    assert torch.equal(edges.mlp_residual, torch.ones(SHAPE))


def test_pattern_attention_gives_what_dense_attention_gives(full: Decoder) -> None:
    x, rotation = stream_before(full, 0)
    wanted = full.attention(0, x, rotation, DenseAttend(*SHAPE))
    torch.testing.assert_close(full.attention(0, x, rotation, PatternAttend(*SHAPE)), wanted, rtol=1e-4, atol=1e-5)
