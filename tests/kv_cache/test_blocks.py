"""The block pool, and the sum of edits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trtllm_core.errors import ConfigError
from trtllm_core.kv_cache import BlockPool
from trtllm_core.plugin.kv_policy import Edits


def test_hints_are_followed_where_they_are_free() -> None:
    pool = BlockPool(6)
    assert [pool.take(), pool.take(3), pool.take(3), pool.take(99), pool.take(4)] == [0, 3, 1, 2, 4]
    assert (pool.take(), pool.free) == (5, 0)
    with pytest.raises(ConfigError, match="empty"):
        pool.take()
    pool.check()


def test_blocks_are_freed_by_their_last_owner() -> None:
    pool = BlockPool(4)
    block = np.array([pool.take()], dtype=np.int32)
    pool.share(np.repeat(block, 2))
    pool.drop(np.repeat(block, 2))
    assert (pool.free, pool.refs[block[0]]) == (3, 1)
    pool.drop(block)
    assert pool.free == len(pool) == 4
    pool.check()


def test_free_list_stays_short() -> None:
    pool, rng, held = BlockPool(16), random.Random(1), []
    for _ in range(3000):
        if held and (not pool.free or rng.random() < 0.5):
            pool.drop(np.array([held.pop(rng.randrange(len(held)))], dtype=np.int32))
        else:
            held.append(pool.take(rng.randrange(-1, 16)))
        pool.check()
    assert len(set(held)) == len(held) == 16 - pool.free


def test_integrity_sees_double_frees_and_leaks() -> None:
    pool = BlockPool(2)
    pool.drop(np.array([0], dtype=np.int32))
    with pytest.raises(AssertionError, match="more often than it was taken"):
        pool.check()
    pool = BlockPool(2)
    pool.refs[pool.take()] = 0
    with pytest.raises(AssertionError, match="count as free"):
        pool.check()
    pool.free = 2
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()


def test_edits_add_up_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps = [
            Edits(tuple((int(rng.integers(6)), int(target)) for target in rng.permutation(6)[: rng.integers(5)]))
            for _ in range(3)
        ]
        one_by_one, at_once = list(range(6)), list(range(6))
        for edits in steps:
            _run(edits, one_by_one)
        _run(sum(steps, Edits()), at_once)
        assert one_by_one == at_once


def test_edits_with_moves_end_a_sum() -> None:
    moves = Edits(moves=((0, 1, 2),))
    assert Edits(((0, 1),)) + moves == Edits(((0, 1),), ((0, 1, 2),))
    assert moves + Edits() == moves
    with pytest.raises(ValueError, match="must be run before"):
        moves + Edits(((0, 1),))


def _run(edits: Edits, blocks: list[int]) -> None:
    read = [blocks[source] for source, _ in edits.copies]
    assert len({target for _, target in edits.copies}) == len(edits.copies)
    for (_, target), value in zip(edits.copies, read, strict=True):
        blocks[target] = value
