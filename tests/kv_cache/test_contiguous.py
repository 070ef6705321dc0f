"""Each verb of the contiguous policy, and what it refuses."""

from __future__ import annotations

import pytest

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import ContiguousPolicy
from trtllm_core.plugin.kv_policy import Admission, Edits, KVBudget, KVModel, KVUsage

MODEL = KVModel(num_layers=1, num_kv_heads=1, head_size=4, dtype="float32", bytes_per_token=32)


def contiguous(slots: int = 3, longest: int = 10, tpb: int = 4, tokens: int = 36) -> ContiguousPolicy:
    policy = ContiguousPolicy()
    policy.plan(MODEL, KVBudget(slots, longest, tpb, tokens))
    return policy


def begin(policy: ContiguousPolicy, slot: int, length: int) -> None:
    assert policy.admit(slot, range(length), 0) == Admission()
    policy.extend([slot], [length])
    policy.commit([slot], [length])


def test_a_slot_is_a_run() -> None:
    policy = contiguous()
    begin(policy, 2, 5)
    placement = policy.extend([2], [5])
    assert placement.tables.tolist() == [[6, 7, 8]]
    assert placement.room.tolist() == [5]
    assert not placement.edits
    assert policy.usage() == KVUsage(total=9, free=6)


def test_a_slot_may_be_one_row() -> None:
    plan = ContiguousPolicy().plan(MODEL, KVBudget(3, 10, 10, 30))
    assert (plan.num_blocks, plan.tokens_per_block, plan.max_blocks_per_slot) == (3, 10, 1)


def test_a_small_budget_is_shared_evenly() -> None:
    policy = contiguous(tokens=24)
    with pytest.raises(CapacityError, match=r"make 9, but a sequence can hold 8: raise KVCacheConfig.max_tokens"):
        policy.admit(0, range(5), 4)
    begin(policy, 0, 8)
    with pytest.raises(CapacityError, match="would hold 9"):
        policy.extend([0], [1])
    with pytest.raises(CapacityError, match="one block of 4 for each of 3 slots"):
        contiguous(tokens=11)


def test_refusals() -> None:
    policy = contiguous()
    begin(policy, 0, 5)
    with pytest.raises(ConfigError, match="in use"):
        policy.admit(0, range(1), 0)
    with pytest.raises(CapacityError, match=r"raise BuildConfig\.max_seq_len"):
        policy.admit(1, range(8), 3)
    with pytest.raises(ConfigError, match="5 tokens: 6 cannot"):
        policy.rewind([0], [6])
    with pytest.raises(ConfigError, match="not in use"):
        policy.release([1])
    with pytest.raises(ConfigError, match="room for 5"):
        policy.commit([0], [6])


def test_forks_copy_the_blocks_with_tokens_at_once() -> None:
    policy = contiguous()
    begin(policy, 0, 5)
    begin(policy, 1, 3)
    assert policy.fork([1, 0], [0, 1]) == Edits(copies=((3, 0), (0, 3), (1, 4)))
    assert (policy.length(0), policy.length(1)) == (3, 5)
    assert policy.fork([1, 1], [2, 1]) == Edits(copies=((3, 6), (4, 7)))
    assert policy.length(2) == 5
    policy.check_integrity()


def test_rewind_and_release() -> None:
    policy = contiguous()
    begin(policy, 0, 5)
    policy.rewind([0], [5])
    assert policy.extend([0], [0]).room.tolist() == [10]
    policy.release([0])
    assert policy.usage().free == 9
    assert policy.length(0) == 0
