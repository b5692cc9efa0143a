"""The free list of the cache's blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.blocks import BlockPool


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200)), max_size=60))
def test_no_block_has_two_owners_and_none_is_lost(actions: list[tuple[bool, int]]) -> None:
    pool, owned = BlockPool(12), []
    for taking, tokens in actions:
        if taking:
            blocks = pool.take(tokens)
            assert (blocks is None) == (-(-tokens // 32) > 12 - sum(map(len, owned)))
            owned += [blocks] if blocks else []
        elif owned:
            pool.give_back(owned.pop(tokens % len(owned)))
        flat = [block for blocks in owned for block in blocks]
        assert len(set(flat)) == len(flat) == pool.used
    for blocks in owned:
        pool.give_back(blocks)
    assert pool.used == 0
    assert sorted(pool.take(12 * 32) or []) == list(range(12))


def test_fits() -> None:
    assert BlockPool(2).fits(64)
    assert not BlockPool(2).fits(65)


def test_giving_back_twice_frees_once() -> None:
    pool = BlockPool(3)
    blocks = pool.take(40) or []
    pool.give_back(blocks)
    pool.give_back(blocks)
    assert pool.used == 0
