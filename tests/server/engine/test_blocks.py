"""The blocks of the cache: none has two writers, none is lost, and a key leads to what it stands for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.blocks import BlockPool, chain_key

TOTAL = 8


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=80))
def test_blocks_are_taken_shared_and_given_back(actions: list[tuple[int, int]]) -> None:
    """Texts 0..6: text t consists of t blocks, those that it has in common with others first."""
    pool, content = BlockPool(TOTAL), {}
    held: list[tuple[list[int], int]] = []
    for action, t in actions:
        keys = [bytes([min(i, t // 2)]) + bytes([i]) for i in range(t)]
        if action < 2:
            shared = pool.share(keys) if action else []
            assert [content[block] for block in shared] == keys[: len(shared)]
            own = pool.take(t - len(shared))
            if own is None:
                assert t - len(shared) > pool.free
                pool.give_back(shared)
                continue
            assert not set(own) & {block for blocks, _ in held for block in blocks}
            for block, key in zip(own, keys[len(shared) :], strict=True):
                content[block] = key  # written, then made known
                pool.mark(block, key)
            held.append((shared + own, t))
        elif held:
            pool.give_back(held.pop(t % len(held))[0])
        assert pool.used == len({block for blocks, _ in held for block in blocks})
        assert pool.used + pool.free == TOTAL
    for blocks, _ in held:
        pool.give_back(blocks)
    assert sorted(pool.take(TOTAL) or []) == list(range(TOTAL))


def test_what_was_unused_for_longest_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2) or [], pool.take(2) or []
    for i, block in enumerate([*old, *new]):
        pool.mark(block, bytes([i]))
    pool.give_back(old)
    pool.give_back(new)
    pool.take(1)
    assert [len(pool.share([bytes([i])])) for i in range(4)] == [1, 0, 1, 1]


def test_fits() -> None:
    assert BlockPool(2).fits(64)
    assert not BlockPool(2).fits(65)


def test_giving_back_twice_frees_once() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2) or []
    pool.give_back(blocks)
    pool.give_back(blocks)
    assert pool.used == 0
    assert pool.free == 3


def test_keys_tell_tokens_places_and_beginnings_apart() -> None:
    first = chain_key(b"", [1, 2])
    keys = {first, chain_key(b"", [2, 1]), chain_key(first, [1, 2]), chain_key(chain_key(b"", [2, 1]), [1, 2])}
    assert len(keys) == 4
    assert first == chain_key(b"", [1, 2])
