"""The paged cache: attention over scattered blocks against a plain loop, and what a pass may write."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace.families import read_spec
from strace.kv import BLOCK, Batch, PagedAttend, block_bytes, make_cache
from tests.tiny import make_tiny, scatter_blocks

SPEC = read_spec(make_tiny(num_attention_heads=8, num_key_value_heads=4).config)
BLOCKS = 16
LAYER = 1


def attend_plainly(q: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None) -> Tensor:
    """Attention of q [n, H, D] at positions start.. over keys and values [length, K, D], one query and head at a
    time."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, start + i + 1 - window)
        span = slice(first, start + i + 1)
        for head in range(q.shape[1]):
            scores = keys[span, head // group] @ q[i, head] / q.shape[2] ** 0.5
            out[i, head] = scores.softmax(0) @ values[span, head // group]
    return out


@st.composite
def passes(draw: Any) -> SimpleNamespace:
    """A random cache and a ragged pass over it, of all heads or of some."""
    sequences = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 9), min_size=sequences, max_size=sequences))
    starts = draw(st.lists(st.integers(0, 80), min_size=sequences, max_size=sequences))
    seed = draw(st.integers(0, 1000))
    kept = draw(st.none() | st.sampled_from([[0], [3], [1, 2], [0, 2, 3]]))
    window = draw(st.none() | st.integers(1, 40))
    generator = torch.Generator().manual_seed(seed)
    cache = make_cache(SPEC, BLOCKS, torch.float32)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(generator=generator)
    tables = scatter_blocks([s + n for s, n in zip(starts, counts, strict=True)], BLOCKS, seed)
    heads = SPEC.kv_heads if kept is None else len(kept)
    n, d = sum(counts), SPEC.head_dim
    q = torch.randn(n, heads * SPEC.group, d, generator=generator)
    k, v = torch.randn(2, n, heads, d, generator=generator)
    batch = Batch([0] * n, counts, starts, tables)
    attention = SimpleNamespace(
        kept=None if kept is None else torch.tensor(kept), window=window, scale=d**-0.5, cap=0.0
    )
    return SimpleNamespace(cache=cache, batch=batch, attention=attention, q=q, k=k, v=v)


def read_entries(entries: Tensor, table: Tensor, length: int) -> Tensor:
    """[length, kv_heads, D], position by position."""
    return torch.stack([entries[table[p // BLOCK], :, p % BLOCK] for p in range(length)])


@settings(max_examples=60)
@given(passes())
def test_a_pass_writes_its_slots_only_and_reads_each_past(case: SimpleNamespace) -> None:
    cache, batch = case.cache, case.batch
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    mixed = PagedAttend(cache, batch, batch.positions)(LAYER, case.attention, case.q, case.k, case.v)

    heads = range(SPEC.kv_heads) if case.attention.kept is None else case.attention.kept.tolist()
    expected = [tensor.clone() for tensor in before]
    token = 0
    for table, start, count in zip(batch.tables, batch.starts, batch.counts, strict=True):
        for position in range(start, start + count):
            for i, head in enumerate(heads):
                expected[LAYER][table[position // BLOCK], head, position % BLOCK] = case.k[token, i]
                expected[SPEC.layers + LAYER][table[position // BLOCK], head, position % BLOCK] = case.v[token, i]
            token += 1
    for after, wanted in zip((*cache.keys, *cache.values), expected, strict=True):
        assert torch.equal(after, wanted)

    token = 0
    for table, start, count in zip(batch.tables, batch.starts, batch.counts, strict=True):
        past = [read_entries(t[LAYER], table, start + count)[:, list(heads)] for t in (cache.keys, cache.values)]
        wanted = attend_plainly(case.q[token : token + count], *past, start, case.attention.window)
        assert (mixed[token : token + count] - wanted).abs().max() <= 1e-5
        token += count


def test_positions_follow_each_start() -> None:
    batch = Batch([0] * 6, [1, 3, 2], [31, 0, 64], torch.zeros(3, 3, dtype=torch.int64))
    assert batch.positions.tolist() == [31, 0, 1, 2, 64, 65]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_takes_the_memory_it_says(dtype: torch.dtype) -> None:
    cache = make_cache(SPEC, 3, dtype)
    assert cache.blocks == 3
    assert sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) == 3 * block_bytes(SPEC, dtype)
    shape = (3, SPEC.kv_heads, 32, SPEC.head_dim)
    assert all(tensor.shape == shape and tensor.dtype == dtype for tensor in (*cache.keys, *cache.values))
