"""The checks of the method can fail: each is run against a deliberately broken copy, and must catch it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strace import ablate, edges
from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder
from strace.extract import Edge, Floats, Integers, Traces, count_edges
from strace.importance import draw_weights
from tests.strace import test_ablate, test_edges, test_extract, test_importance
from tests.tiny import VARIANTS, save_variant


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_variant(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(open_checkpoint(str(folder)), "fp32")


def test_a_mask_that_never_reaches_attention_is_caught(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect of the authors' code: attention edges are never cut."""
    unpack = ablate.unpack_pairs
    monkeypatch.setattr(ablate, "unpack_pairs", lambda packed, tokens: unpack(np.ones_like(packed), tokens))
    with pytest.raises(AssertionError):
        test_ablate.test_all_attention_off_changes_the_logits(decoder)
    with pytest.raises(AssertionError):
        test_ablate.test_a_random_edge_set_equals_a_run_written_out_by_hand(decoder)


def test_a_mask_of_the_wrong_head_is_caught(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = ablate.unpack_pairs
    monkeypatch.setattr(ablate, "unpack_pairs", lambda packed, tokens: unpack(np.roll(packed, 1, 1), tokens))
    with pytest.raises(AssertionError):
        test_ablate.test_one_head_off_equals_removing_its_slice_of_the_output_projection(decoder, 1, 1)


def test_a_residual_that_is_lost_is_caught(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "_keep", lambda mask, value, otherwise: otherwise)
    with pytest.raises(AssertionError):
        test_ablate.test_all_edges_on_equal_the_full_run(decoder)


def test_a_missing_part_of_a_node_is_caught(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output projection's bias where there is one, else a head."""
    write_out = test_importance.write_out_attention
    has_bias = decoder.layers[0].attention is not None and decoder.layers[0].attention.o.bias is not None

    def broken(*given: Any) -> tuple[Tensor, Tensor]:
        vectors, bias = write_out(*given)
        return (vectors, torch.zeros_like(bias)) if has_bias else (vectors[1:], bias)

    monkeypatch.setattr(test_importance, "write_out_attention", broken)
    with pytest.raises(AssertionError):
        test_importance.test_vectors_into_a_node_sum_to_it(decoder)


@pytest.mark.parametrize("measure", ["l1", "ifr"])
def test_weights_that_are_not_normalised_are_caught(
    decoder: Decoder, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strace.importance._host", lambda x: 0.99 * x.numpy())
    with pytest.raises(AssertionError):
        test_importance.test_weights_into_a_node_sum_to_one(decoder, measure)


def test_a_shortcut_with_the_wrong_heads_is_caught(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = edges.value_norms
    monkeypatch.setattr(edges, "value_norms", lambda part, v: norms(part, v).roll(1, 1))
    with pytest.raises(AssertionError):
        test_edges.test_vectors_into_a_node_sum_to_it_and_the_shortcut_is_their_norm(decoder)


def test_a_final_norm_that_is_left_out_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strace.importance._read_out", lambda norm, x: x)
    with pytest.raises(AssertionError):
        test_importance.test_weights_equal_those_of_vectors_written_out_in_float64(folder, "l1", "fp32")


def test_a_trace_by_local_weight_alone_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heaviest edges anywhere, whether or not they hang on the output."""
    kappas = Traces._kappas

    def broken(self: Traces, number: int) -> Iterator[tuple[str, Floats]]:
        for kind, kappa in kappas(self, number):
            yield kind, np.where(kappa > -np.inf, getattr(self.weights.steps[number], kind), kappa)

    monkeypatch.setattr(Traces, "_kappas", broken)
    with pytest.raises(AssertionError):
        test_importance.test_traces_are_nested_connected_and_of_all_edges(folder, "l1")


def test_traces_that_are_not_nested_are_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size grown over weights of its own: connected and of the right number, no more."""
    edges_of, spec = Traces.edges, open_checkpoint(str(folder)).spec

    def redrawn(self: Traces, count: int) -> list[Edge]:
        return edges_of(Traces(draw_weights(spec, self.weights.tokens, count)), count)

    monkeypatch.setattr(Traces, "edges", redrawn)
    with pytest.raises(AssertionError, match="<="):
        test_importance.test_traces_are_nested_connected_and_of_all_edges(folder, "l1")


@pytest.mark.parametrize("parallel", [False, True])
def test_ties_in_the_wrong_order_are_caught(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_number(self: Traces, weight: Floats, number: Integers) -> Integers:
        return np.argsort(number)

    monkeypatch.setattr(Traces, "_sort_tied", by_number)
    with pytest.raises(AssertionError):
        test_extract.assert_equal_at_all_counts(test_extract.make_weights(3, 2, 6, parallel=parallel))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_wrong_count_of_edges_is_caught(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_extract, "count_edges", lambda *shape, parallel: count_edges(*shape, not parallel))
    with pytest.raises(AssertionError):
        test_extract.test_edge_count_equals_its_formula_and_brute_force((4, 3, 7), parallel)
