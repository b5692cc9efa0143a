"""Edge weights of tiny models: vectors sum to their node, weights to 1, both equal those written out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Attention, Decoder, DenseAttend
from strace.extract import KINDS as KINDS_OF_EDGES
from strace.extract import SIZES, Edge, EdgeWeights, Traces, count_edges, pairs
from strace.importance import MEASURES, carry_flow, weigh_edges
from tests.tiny import VARIANTS, random_tokens, save_tiny, save_variant

T = 9


@pytest.fixture(params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_variant(tmp_path, request.param)


@pytest.fixture
def decoder(folder: Path) -> Decoder:
    return load_decoder(open_checkpoint(str(folder)), "fp32")


@dataclass
class Level:
    """One level of the stream, float64: the nodes [T, hidden], the vectors of the edges that lead to them (residual and
    MLP [T, hidden], attention [H, T, T, hidden]), and the projection's bias, which no edge carries."""

    nodes: Tensor
    residual: Tensor
    attention: Tensor | None = None
    bias: Tensor | None = None
    mlp: Tensor | None = None


class Kept(DenseAttend):
    """Dense attention that keeps what it was given."""

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.given = q, k, v
        return super().__call__(layer, attention, q, k, v)


def write_out_attention(part: Attention, z: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of all attention edges of a layer, head by head, and what the bias adds.

    A post-norm's statistics are those of the run, whose mixed values are z.
    """
    group, places = part.heads // part.kv_heads, torch.arange(len(q))
    distance = places[:, None] - places
    there = (distance >= 0) & (distance < (part.window or len(q)))
    weight = part.o.dense().double().unflatten(1, (part.heads, -1))
    edges = []
    for h in range(part.heads):
        scores = q[:, h].double() @ k[:, h // group].double().T * part.scale
        scores = part.cap * (scores / part.cap).tanh() if part.cap else scores
        alpha = scores.masked_fill(~there, -torch.inf).softmax(-1)
        edges.append(alpha[..., None] * (v[:, h // group].double() @ weight[:, h].T))
    vectors = torch.stack(edges)
    bias = torch.zeros(len(weight)).double() if part.o.bias is None else part.o.bias.double()
    if part.post_norm is None:
        return vectors, bias.expand(len(q), -1)
    rms = (part.o(z).double().square().mean(-1, keepdim=True) + part.post_norm.eps).sqrt()
    return vectors * part.post_norm.weight / rms[:, None], bias * part.post_norm.weight / rms


@torch.inference_mode()
def write_out(decoder: Decoder, tokens: Tensor) -> list[Level]:
    """Every level above the embeddings, from the activations of a full run."""
    levels: list[Level] = []
    attend, seen = Kept(1, len(tokens)), {}

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen[name] = value if name == "z" else value.double()
        part = decoder.layers[layer].attention if layer < decoder.spec.layers else None
        if name == "stream_mid":
            levels.append(Level(seen[name], seen["stream"], *write_out_attention(part, seen["z"], *attend.given)))
        if name == "stream_out" and decoder.spec.parallel:
            attention = write_out_attention(part, seen["z"], *attend.given)
            levels.append(Level(seen[name], seen["stream"], *attention, seen["mlp_out"]))
        elif name == "stream_out":
            levels.append(Level(seen[name], seen["stream_mid"], mlp=seen["mlp_out"]))
        return value

    decoder.streams(tokens, torch.arange(len(tokens)), attend, tap)
    return levels


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
    levels = write_out(decoder, random_tokens(T))
    assert len(levels) == decoder.spec.steps
    for level in levels:
        whole = level.residual.clone()
        for part in (level.mlp, level.bias, None if level.attention is None else level.attention.sum((0, 2))):
            if part is not None:
                whole += part
        assert ((whole - level.nodes).norm(dim=-1) / level.nodes.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_weights_into_a_node_sum_to_one(decoder: Decoder, measure: str) -> None:
    weights = weigh_edges(decoder, random_tokens(11), measure)
    assert torch.allclose(sums(weights), torch.ones(decoder.spec.steps, 11).double(), atol=1e-5)


def read_out(decoder: Decoder, x: Tensor) -> Tensor:
    """The final norm at fixed statistics, but for its scale."""
    centre = x.mean(-1, keepdim=True) if decoder.spec.norm == "layer" else 0
    return (x - centre) * decoder.final_norm.weight


def expected(level: Level, i: int, measure: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Weights into node i: residual, then attention by head and source, then the MLP."""
    vectors = [level.residual[i : i + 1]]
    vectors += [] if level.attention is None else [level.attention[:, i, : i + 1].flatten(0, 1)]
    vectors += [] if level.mlp is None else [level.mlp[i : i + 1]]
    z, node = torch.cat(vectors), level.nodes[i]
    raw = z.abs().sum(-1)
    if measure == "ifr":
        raw = (node.abs().sum() - (node - z).abs().sum(-1)).clamp_min(0)
    return (raw / raw.sum()).numpy()


# In bf16 too: the activations are then bf16's, but nothing is added up in it.
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_weights_equal_those_of_vectors_written_out_in_float64(folder: Path, measure: str, format: str) -> None:
    decoder, tokens = load_decoder(open_checkpoint(str(folder)), format), random_tokens(T, seed=2)
    weights, levels, rows = weigh_edges(decoder, tokens, measure), write_out(decoder, tokens), pairs(T)[0]
    last = levels[-1]
    for name, vectors in vars(last).items():
        setattr(last, name, None if vectors is None else read_out(decoder, vectors))
    for level, step in zip(levels, weights.steps, strict=True):
        for i in range(T):
            found = [step.residual[i : i + 1]]
            found += [] if step.attention is None else [step.attention[:, rows == i].ravel()]
            found += [] if step.mlp is None else [step.mlp[i : i + 1]]
            found_here = np.concatenate(found)
            np.testing.assert_allclose(np.maximum(found_here, 0), expected(level, i, measure), atol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_traces_are_nested_connected_and_of_all_edges(folder: Path, measure: str) -> None:
    decoder = load_decoder(open_checkpoint(str(folder)), "fp32")
    spec = decoder.spec
    traces = Traces(weigh_edges(decoder, random_tokens(T), measure))
    assert traces.total == count_edges(spec.layers, spec.heads, T, spec.parallel)
    smaller: set[Edge] = set()
    for count in sorted({traces.count_of(size) for size in SIZES}):
        edges = set(traces.edges(count))
        assert len(edges) == count
        assert smaller <= edges
        reached = {(spec.steps, T - 1)}
        for edge in sorted(edges, key=lambda e: -e.step):
            assert (edge.step + 1, edge.target) in reached
            reached.add((edge.step, edge.source))
        smaller = edges


class Largest(TorchDispatchMode):
    """The most elements that any tensor has while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_no_tensor_grows_with_the_square_of_a_long_prompt(
    decoder: Decoder, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(200)
    whole = weigh_edges(decoder, tokens, measure)
    monkeypatch.setattr("strace.importance._CHUNK", 1)
    with Largest() as largest:
        pieces = weigh_edges(decoder, tokens, measure)
    # Linear in T: activations of the widest product, one target's pattern, one head's vectors.
    spec = decoder.spec
    widest = max(2 * spec.mlp, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
    assert largest.elements <= max(200 * widest, spec.hidden * 2 * spec.mlp) < spec.heads * 200**2
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        for name in KINDS_OF_EDGES:
            some, same = getattr(one, name), getattr(other, name)
            assert (some is None) == (same is None)
            if some is not None:
                np.testing.assert_allclose(some, same, atol=2e-5)  # sums in another order


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


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sliding_window_has_no_edges_outside_it(tmp_path: Path, measure: str) -> None:
    save_tiny(tmp_path, "mistral", sliding_window=3)
    decoder = load_decoder(open_checkpoint(str(tmp_path)), "fp32")
    weights = weigh_edges(decoder, random_tokens(7), measure)
    attention = weights.steps[0].attention
    assert attention is not None
    rows, columns = pairs(7)
    assert np.array_equal(np.isinf(attention[0]), rows - columns >= 3)
    assert measure in ("random", "flow") or torch.allclose(sums(weights), torch.ones(6, 7).double(), atol=1e-5)
    layers, heads = decoder.spec.layers, decoder.spec.heads
    assert Traces(weights).total < count_edges(layers, heads, 7)


def test_random_weights_are_the_models_shape_and_follow_the_seed(decoder: Decoder) -> None:
    tokens = random_tokens(5)
    one, same, other = (weigh_edges(decoder, tokens, "random", seed) for seed in (1, 1, 2))
    assert np.array_equal(one.steps[0].residual, same.steps[0].residual)
    assert not np.array_equal(one.steps[0].residual, other.steps[0].residual)


def sum_paths(weights: EdgeWeights, edges: list[Edge]) -> dict[Edge, float]:
    """Of every edge the sum over all paths through it, from any embedding to the output, of products of weights."""
    outgoing: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        outgoing.setdefault((edge.step, edge.source), []).append(edge)
    found = dict.fromkeys(edges, 0.0)
    out = len(weights.steps), weights.tokens - 1

    def walk(node: tuple[int, int], path: list[Edge], product: float) -> None:
        if node == out:
            for edge in path:
                found[edge] += product
        for edge in outgoing.get(node, []):
            walk((edge.step + 1, edge.target), [*path, edge], product * edge.weight)

    for place in range(weights.tokens):
        walk((0, place), [], 1.0)
    return found


@pytest.mark.parametrize("variant", ["llama", "mistral", "gpt_neox"])
def test_flow_sums_the_products_of_all_paths(tmp_path: Path, variant: str) -> None:
    extra = {"sliding_window": 2} if variant == "mistral" else {}
    save_tiny(tmp_path, variant, num_hidden_layers=2, **extra)
    local = weigh_edges(load_decoder(open_checkpoint(str(tmp_path)), "fp32"), random_tokens(3))
    traces, flow = Traces(local), Traces(carry_flow(local))
    assert traces.total == flow.total
    carried = {(e.step, e.kind, e.head, e.target, e.source): e.weight for e in flow.edges(flow.total)}
    by_path = sum_paths(local, traces.edges(traces.total))
    for e, expected in by_path.items():
        assert carried[e.step, e.kind, e.head, e.target, e.source] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    for number in range(len(local.steps)):
        assert sum(w for (step, *_), w in carried.items() if step == number) == pytest.approx(1, abs=1e-5)


def test_bad_input_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"unknown importance 'l2'.*l1, ifr, random, flow"):
        weigh_edges(decoder, random_tokens(3), "l2")
    for measure in MEASURES:
        with pytest.raises(ValueError, match="empty prompt"):
            weigh_edges(decoder, random_tokens(0), measure)
