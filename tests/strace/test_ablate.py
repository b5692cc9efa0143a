"""Masked runs of tiny models: all on, the authors' defect, one head off, and edge sets written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from strace.ablate import CONTROLS, Masks, Selection, Selections, compose, measure_means, run_masked
from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Attention, Decoder, DenseAttend, Layer
from strace.edges import PatternAttend
from strace.extract import SIZES, Booleans, StepMask, Traces, pairs
from strace.importance import draw_weights, weigh_edges
from strace.linear import Linear
from tests.tiny import VARIANTS, random_tokens, save_variant

T = 9


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    return load_decoder(open_checkpoint(str(save_variant(tmp_path, request.param))), "fp32")


@dataclass
class Written:
    """One edge set given mask by mask."""

    steps: list[StepMask]

    def __len__(self) -> int:
        return 1

    def step(self, number: int, rows: slice) -> StepMask:
        return self.steps[number]


def all_on(decoder: Decoder, tokens: int = T) -> Written:
    def on(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return np.ones((1, *shape), np.bool_)

    steps: list[StepMask] = []
    for _ in range(decoder.spec.layers):
        heads = on(decoder.spec.heads, len(pairs(tokens)[0]))
        if decoder.spec.parallel:
            steps.append(StepMask(on(tokens), heads, on(tokens)))
        else:
            steps += [StepMask(on(tokens), heads, None), StepMask(on(tokens), None, on(tokens))]
    return Written(steps)


def attention_of(masks: Written) -> list[Booleans]:
    """The masks of each layer's attention edges."""
    return [mask.attention for mask in masks.steps if mask.attention is not None]


def plain(decoder: Decoder, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        stream = decoder.streams(tokens, torch.arange(len(tokens)), DenseAttend(1, len(tokens)))
        return decoder.logits(stream[-1:])


def logits(decoder: Decoder, masks: Masks | None, tokens: Tensor | None = None) -> Tensor:
    return run_masked(decoder, random_tokens(T) if tokens is None else tokens, masks).logits


def test_all_edges_on_equal_the_full_run(decoder: Decoder) -> None:
    assert torch.allclose(logits(decoder, all_on(decoder)), plain(decoder, random_tokens(T)), atol=1e-4)
    assert torch.allclose(logits(decoder, None), plain(decoder, random_tokens(T)), atol=1e-4)


def test_all_attention_off_changes_the_logits(decoder: Decoder) -> None:
    masks = all_on(decoder)
    for attention in attention_of(masks):
        attention[:] = False
    without = logits(decoder, masks)
    assert (without - plain(decoder, random_tokens(T))).abs().max() > 0.1
    dropped = replace(decoder, layers=[Layer(_only_bias(layer), layer.mlp) for layer in decoder.layers])
    assert torch.allclose(without, plain(dropped, random_tokens(T)), atol=1e-4)


def _only_bias(layer: Layer, head: int | None = None) -> Attention:
    """The attention sublayer with its output projection's weights (of one head) zero, its bias kept."""
    part = layer.attention
    assert part is not None
    weight = part.o.dense().clone()
    size = weight.shape[1] // part.heads
    weight.view(len(weight), part.heads, size)[:, slice(None) if head is None else head] = 0
    return replace(part, o=Linear(weight, part.o.bias, torch.float32))


@pytest.mark.parametrize(("l", "head"), [(0, 0), (1, 1), (2, -1)])
def test_one_head_off_equals_removing_its_slice_of_the_output_projection(decoder: Decoder, l: int, head: int) -> None:
    masks = all_on(decoder)
    attention_of(masks)[l][:, head] = False
    layers = list(decoder.layers)
    layers[l] = Layer(_only_bias(layers[l], head), layers[l].mlp)
    removed = plain(replace(decoder, layers=layers), random_tokens(T))
    assert torch.allclose(logits(decoder, masks), removed, atol=1e-4)
    assert (removed - plain(decoder, random_tokens(T))).abs().max() > 1e-3


def test_a_random_edge_set_equals_a_run_written_out_by_hand(decoder: Decoder) -> None:
    generator = np.random.default_rng(0)
    masks = all_on(decoder)
    for mask in masks.steps:
        for part in (mask.residual, mask.attention, mask.mlp):
            if part is not None:
                part[:] = generator.random(part.shape) < 0.6
    into_output = masks.steps[-1].mlp
    assert into_output is not None
    into_output[:, -1] = True  # else the output may hang on nothing, and any run equals any other
    assert torch.allclose(logits(decoder, masks), _by_hand(decoder, masks), atol=1e-4)


@torch.inference_mode()
def _by_hand(decoder: Decoder, masks: Written) -> Tensor:
    tokens, rows_columns = random_tokens(T), pairs(T)
    places = torch.arange(T)
    x, rotation = decoder.embedded(tokens, places), decoder.rotation(places)
    steps = iter(masks.steps)
    for l, layer in enumerate(decoder.layers):
        mask, part, attend = next(steps), layer.attention, PatternAttend(1, T)
        assert part is not None
        assert mask.attention is not None
        decoder.attention(l, x, rotation, attend)
        bias = 0 if part.o.bias is None else part.o.bias
        weight = part.o.dense().view(-1, part.heads, decoder.spec.head_dim)
        added = torch.zeros_like(x) + bias
        for h in range(part.heads):
            for p, (i, j) in enumerate(zip(*rows_columns, strict=True)):
                if mask.attention[0, h, p]:
                    value = attend.v[0, h // decoder.spec.group, j]
                    added[i] += attend.alpha[0, h, i, j] * (weight[:, h] @ value)
        added = added if part.post_norm is None else part.post_norm(added)
        if not decoder.spec.parallel:
            x, added, mask = torch.from_numpy(mask.residual[0])[:, None] * x + added, torch.zeros_like(x), next(steps)
        mlp = decoder.mlp(l, x)
        assert mlp is not None
        assert mask.mlp is not None
        x = torch.from_numpy(mask.residual[0])[:, None] * x + added + torch.from_numpy(mask.mlp[0])[:, None] * mlp
    return decoder.logits(x[-1:])


def make_selections(decoder: Decoder, tokens: Tensor, counts: list[int]) -> Selections:
    traces = Traces(weigh_edges(decoder, tokens))
    random = Traces(draw_weights(decoder.spec, len(tokens), 1))
    return Selections(traces, random, [Selection(control, count) for control in CONTROLS for count in counts])


def test_controls_hold_the_edges_that_their_names_say(decoder: Decoder) -> None:
    tokens = random_tokens(T)
    probe = make_selections(decoder, tokens, [])
    counts = sorted({probe.traces.count_of(size) for size in SIZES})
    sets = make_selections(decoder, tokens, counts)
    reached = make_selections(decoder, tokens, [sets.traces.total])
    compositions = {"trace": compose(sets.traces, counts), "random": compose(sets.random, counts)}
    held = np.zeros(len(sets), np.int64)
    for number in range(decoder.spec.steps):
        in_graph = reached.traces.masks(number, [sets.traces.total])
        mask = sets.step(number, slice(0, len(sets)))
        for kind in ("residual", "attention", "mlp"):
            part, exists = getattr(mask, kind), getattr(in_graph, kind)
            if part is not None:
                held += (part & exists).reshape(len(sets), -1).sum(1)
    assert held.tolist() == sets.count(compositions)
    by_name = dict(zip([(s.control, s.count) for s in sets.chosen], held.tolist(), strict=True))
    for count in counts:
        assert by_name["trace", count] == by_name["random", count] == count
        assert by_name["inverse", count] == sets.traces.total - count


def test_batches_of_sets_equal_single_runs_of_single_targets(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(T)
    sets = make_selections(decoder, tokens, [30, 120, 200])
    together = run_masked(decoder, tokens, sets)
    monkeypatch.setattr("strace.ablate._BATCH_TOKENS", 1)
    monkeypatch.setattr("strace.ablate._CHUNK", 1)
    apart = run_masked(decoder, tokens, sets)
    assert torch.allclose(together.logits, apart.logits, atol=1e-4)
    assert together.states.shape == (len(sets), decoder.spec.layers, decoder.spec.hidden)
    assert torch.allclose(together.states, apart.states, atol=1e-3)


def test_a_whole_trace_is_the_full_run_and_its_inverse_is_nothing(decoder: Decoder) -> None:
    tokens = random_tokens(T)
    traces = Traces(weigh_edges(decoder, tokens))
    sets = replace(
        make_selections(decoder, tokens, []),
        chosen=[Selection("trace", traces.total), Selection("inverse", traces.total), Selection("trace", 0)],
    )
    whole, inverse, empty = run_masked(decoder, tokens, sets).logits
    assert torch.allclose(whole, plain(decoder, tokens)[0], atol=1e-4)
    assert torch.allclose(inverse, empty, atol=1e-5)


def test_means_replace_what_is_cut(decoder: Decoder) -> None:
    """With means of one prompt of one token, every edge carries exactly its mean, so nothing can change."""
    token = random_tokens(1)
    means = measure_means(decoder, [token])
    traces = Traces(weigh_edges(decoder, token))
    sets = replace(make_selections(decoder, token, []), traces=traces, chosen=[Selection("trace", 0)])
    assert torch.allclose(run_masked(decoder, token, sets, means).logits, plain(decoder, token), atol=1e-4)
    assert not torch.allclose(run_masked(decoder, token, sets).logits, plain(decoder, token), atol=1e-2)


def test_means_are_over_all_positions_of_all_prompts(decoder: Decoder) -> None:
    prompts = [random_tokens(4, 1), random_tokens(7, 2)]
    means = measure_means(decoder, prompts)
    embedded = torch.cat([decoder.embedded(p, torch.arange(len(p))) for p in prompts]).mean(0)
    assert torch.allclose(means.residual[0], embedded, atol=1e-5)
    assert [mlp is None for mlp in means.mlp] == ([False] if decoder.spec.parallel else [True, False]) * 3
    assert [tuple(v.shape) for v in means.values] == [(2, decoder.spec.head_dim)] * decoder.spec.layers
    with pytest.raises(ValueError, match="at least one prompt"):
        measure_means(decoder, [])
