"""Each verb of the paged policy, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import PagedOptions, PagedPolicy
from trtllm_core.plugin.kv_policy import Admission, Edits, KVBudget, KVModel, KVUsage, OutOfBlocksError

MODEL = KVModel(num_layers=1, num_kv_heads=1, head_size=4, dtype="float32", bytes_per_token=32)


def paged(blocks: int = 16, slots: int = 4, longest: int = 32, tpb: int = 4, **options: object) -> PagedPolicy:
    policy = PagedPolicy(PagedOptions(**options))
    policy.plan(MODEL, KVBudget(slots, longest, tpb, blocks * tpb))
    return policy


def begin(policy: PagedPolicy, slot: int, length: int, new: int = 0) -> None:
    assert policy.admit(slot, range(length), new) == Admission()
    policy.extend([slot], [length])
    policy.commit([slot], [length])


def table(policy: PagedPolicy, slot: int) -> list[int]:
    return [block for block in policy.tables([slot])[0].tolist() if block >= 0]


def test_plan_sizes_the_pool() -> None:
    plan = PagedPolicy().plan(MODEL, KVBudget(max_slots=2, max_seq_len=10, tokens_per_block=4, max_tokens=27))
    assert (plan.num_blocks, plan.max_blocks_per_slot, plan.window, plan.sink) == (6, 3, None, 0)
    assert plan.bytes == 6 * 4 * 32


def test_plan_of_a_ring() -> None:
    policy = PagedPolicy(PagedOptions(max_attention_window=9, sink_token_length=2))
    plan = policy.plan(MODEL, KVBudget(2, 100, 4, 100))
    assert (plan.max_blocks_per_slot, plan.window, plan.sink) == (3, 9, 2)
    assert [plan.cache_index(p) for p in (0, 8, 9, 15, 16)] == [0, 8, 2, 8, 2]


def test_a_window_that_is_never_reached_is_no_ring() -> None:
    policy = PagedPolicy(PagedOptions(max_attention_window=100, sink_token_length=2))
    plan = policy.plan(MODEL, KVBudget(2, 100, 4, 100))
    assert (plan.window, plan.sink, plan.max_blocks_per_slot) == (None, 0, 25)


def test_a_slot_is_no_larger_than_the_pool() -> None:
    plan = PagedPolicy(PagedOptions(max_attention_window=17)).plan(MODEL, KVBudget(2, 100, 4, 16))
    assert (plan.max_blocks_per_slot, plan.window) == (4, None)
    policy = paged(blocks=4)
    begin(policy, 0, 16)
    with pytest.raises(CapacityError, match="would hold 17 tokens, but a sequence can hold 16"):
        policy.extend([0], [1])
    plan = PagedPolicy(PagedOptions(max_attention_window=16)).plan(MODEL, KVBudget(2, 100, 4, 16))
    assert (plan.max_blocks_per_slot, plan.window) == (4, 16)


def test_plan_refuses_a_pool_without_a_block() -> None:
    with pytest.raises(CapacityError, match=r"3 tokens.*one block of 4.*max_tokens"):
        PagedPolicy().plan(MODEL, KVBudget(1, 8, 4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_token_length": 4}, "only means something with max_attention_window"),
        ({"sink_token_length": 4, "max_attention_window": 4}, "must be below"),
        ({"max_attention_window": 0}, "max_attention_window"),
        ({"watermark": 1.0}, "watermark"),
        ({"window": 4}, "no field 'window'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PagedOptions(**options)


def test_admission_counts_the_worst_case() -> None:
    policy = paged(blocks=8)
    begin(policy, 0, 4, new=16)  # 5 blocks promised, 1 held
    assert policy.usage() == KVUsage(total=8, free=7)
    assert policy.admit(1, range(4), 9) is None
    assert policy.admit(1, range(4), 8) == Admission()
    assert policy.admit(2, range(1), 0) is None
    policy.release([0])
    assert policy.admit(2, range(1), 0) == Admission()


def test_admission_with_a_window_counts_the_window() -> None:
    policy = paged(blocks=4, longest=1000, max_attention_window=8)
    assert policy.admit(0, range(500), 500) == Admission()
    assert policy.admit(1, range(500), 500) == Admission()
    assert policy.admit(2, range(1), 0) is None


def test_admission_refuses_what_can_never_fit() -> None:
    policy = paged(blocks=4)
    with pytest.raises(CapacityError, match=r"need 20 tokens.*whole pool has 16: raise KVCacheConfig.max_tokens"):
        policy.admit(0, range(10), 7)
    with pytest.raises(CapacityError, match=r"make 33, but a sequence can hold 32: raise BuildConfig.max_seq_len"):
        policy.admit(0, range(30), 3)
    with pytest.raises(ConfigError, match="max_new_tokens must be >= 0"):
        policy.admit(0, range(3), -1)
    assert policy.usage().free == 4


def test_watermark_is_for_forks() -> None:
    policy = paged(blocks=8, watermark=0.25)
    with pytest.raises(CapacityError, match=r"whole pool has 24.*watermark"):
        policy.admit(0, range(25), 0)
    begin(policy, 0, 22)
    assert policy.admit(1, range(1), 0) is None
    policy.fork([0], [1])
    policy.extend([1], [5])  # a copy and a new block
    assert policy.usage().free == 0


def test_a_slot_is_admitted_once() -> None:
    policy = paged()
    begin(policy, 0, 3)
    with pytest.raises(ConfigError, match="slot 0 is in use"):
        policy.admit(0, range(3), 0)
    with pytest.raises(ConfigError, match="no slot 4: the pool was planned for 4"):
        policy.admit(4, range(3), 0)


def test_extend_gives_whole_blocks_and_keeps_room() -> None:
    policy = paged()
    begin(policy, 0, 3, new=10)
    placement = policy.extend([0], [1])
    assert placement.room.tolist() == [1]
    placement = policy.extend([0], [2])
    assert placement.room.tolist() == [5]
    again = policy.extend([0], [2])
    assert again.room.tolist() == [5]
    assert not again.edits
    assert again.tables.tolist() == placement.tables.tolist()
    assert placement.tables.dtype == np.int32
    assert placement.room.dtype == np.int64


def test_tables_do_not_change_under_the_caller() -> None:
    policy = paged()
    begin(policy, 0, 3)
    before = policy.tables([0])
    policy.release([0])
    assert before[0, 0] == 0


def test_slots_lie_in_one_piece_where_there_is_room() -> None:
    policy = paged(blocks=32)
    for slot in range(4):
        begin(policy, slot, 1, new=31)
    for _ in range(31):
        policy.extend(range(4), [1] * 4)
        policy.commit(range(4), [1] * 4)
    assert [table(policy, slot) for slot in range(4)] == [list(range(8 * i, 8 * i + 8)) for i in range(4)]


def test_failing_extend_changes_nothing() -> None:
    policy = paged(blocks=3)
    begin(policy, 0, 4)
    policy.fork([0, 0], [1, 2])
    before = policy.tables([0, 1, 2]).tolist(), policy.usage()
    with pytest.raises(OutOfBlocksError) as info:
        policy.extend([0, 1, 2], [1, 1, 1])
    assert info.value.needed == 1
    assert (policy.tables([0, 1, 2]).tolist(), policy.usage()) == before
    policy.check_integrity()


def test_extend_beyond_max_seq_len() -> None:
    policy = paged()
    begin(policy, 0, 30)
    with pytest.raises(CapacityError, match="slot 0 would hold 33 tokens, but a sequence can hold 32"):
        policy.extend([0], [3])


def test_forks_cannot_take_what_is_promised() -> None:
    policy = paged(blocks=6)
    begin(policy, 0, 4, new=12)  # 4 of 6 blocks are its own
    policy.fork([0], [1])
    policy.extend([1], [8])
    with pytest.raises(OutOfBlocksError):
        policy.extend([1], [9])
    policy.extend([0], [12])


def test_admitted_beams_never_run_out() -> None:
    policy = paged(blocks=8, slots=2)
    for slot in range(2):
        begin(policy, slot, 4, new=12)
    for _ in range(12):
        policy.fork([1, 0], [0, 1])
        policy.fork([0], [1])
        policy.extend([0, 1], [1, 1])
        policy.commit([0, 1], [1, 1])
        policy.check_integrity()


def test_commit_needs_room() -> None:
    policy = paged()
    begin(policy, 0, 3)
    with pytest.raises(ConfigError, match="2 tokens were committed, but there is room for 1: extend first"):
        policy.commit([0], [2])
    assert policy.length(0) == 3


@pytest.mark.parametrize(
    ("slots", "counts", "message"),
    [
        ([1], [1], "slot 1 is not in use: admit it first"),
        ([0, 0], [1, 1], "slot 0 is named twice"),
        ([9], [1], "no slot 9"),
        ([-1], [1], "no slot -1"),
        ([0], [-1], "counts >= 0"),
        ([0], [1, 1], "as many counts"),
    ],
)
def test_arguments_are_checked(slots: list[int], counts: list[int], message: str) -> None:
    policy = paged()
    begin(policy, 0, 3)
    for verb in (policy.extend, policy.commit, policy.rewind):
        with pytest.raises(ConfigError, match=message):
            verb(slots, counts)
    assert policy.length(0) == 3


def test_rewind_gives_empty_blocks_back() -> None:
    policy = paged()
    begin(policy, 0, 9)
    policy.rewind([0], [1])
    assert table(policy, 0) == [0, 1]
    assert policy.extend([0], [0]).room.tolist() == [0]
    policy.rewind([0], [8])
    assert policy.usage().free == 16
    with pytest.raises(ConfigError, match="slot 0 has 0 tokens: 1 cannot be taken back"):
        policy.rewind([0], [1])


def test_rewind_into_a_shared_block_copies_it_when_it_is_written() -> None:
    policy = paged()
    begin(policy, 0, 8)
    policy.fork([0], [1])
    policy.rewind([0], [2])
    assert table(policy, 0) == table(policy, 1) == [0, 1]
    placement = policy.extend([0], [1])
    new = placement.tables[0, 1]
    assert placement.edits == Edits(copies=((1, new),))
    assert table(policy, 1) == [0, 1]


def test_a_ring_that_has_wrapped_cannot_rewind() -> None:
    policy = paged(max_attention_window=8)
    begin(policy, 0, 8)
    policy.rewind([0], [2])
    policy.extend([0], [3])
    policy.commit([0], [3])
    with pytest.raises(ConfigError, match=r"ring of 8 entries and token 8 has overwritten an older one"):
        policy.rewind([0], [1])
    policy.rewind([0], [0])
    assert policy.length(0) == 9


def test_fork_shares_and_the_first_to_write_copies() -> None:
    policy = paged()
    begin(policy, 0, 6)
    assert policy.extend([0], [0]).room.tolist() == [2]
    assert not policy.fork([0], [1])
    assert policy.usage() == KVUsage(total=16, free=14, shared=2)
    assert policy.extend([0, 1], [0, 0]).room.tolist() == [0, 0]
    placement = policy.extend([0, 1], [1, 1])
    (pair,) = placement.edits.copies
    assert pair[0] == 1
    assert table(policy, 0) == [0, pair[1]]
    assert table(policy, 1) == [0, 1]
    assert placement.room.tolist() == [2, 2]


def test_fork_leaves_reserved_blocks_alone() -> None:
    policy = paged()
    begin(policy, 0, 4, new=8)
    policy.extend([0], [5])
    policy.fork([0], [1])
    assert (table(policy, 0), table(policy, 1)) == ([0, 1, 2], [0])
    assert policy.extend([0, 1], [0, 0]).room.tolist() == [8, 0]
    policy.check_integrity()


def test_fork_is_simultaneous() -> None:
    policy = paged()
    for slot, length in enumerate((3, 5, 9)):
        begin(policy, slot, length)
    before = [table(policy, slot) for slot in range(3)]
    policy.fork([1, 2, 0], [0, 1, 2])
    assert [table(policy, slot) for slot in range(3)] == [before[1], before[2], before[0]]
    assert [policy.length(slot) for slot in range(3)] == [5, 9, 3]
    assert policy.usage().shared == 0
    # Nothing is shared after a permutation, so the room of the last block is there again.
    assert policy.extend([0, 1, 2], [0, 0, 0]).room.tolist() == [3, 3, 1]
    policy.fork([0, 1, 0], [1, 0, 3])
    assert [policy.length(slot) for slot in (0, 1, 3)] == [9, 5, 5]
    policy.check_integrity()


def test_fork_onto_itself_changes_nothing() -> None:
    policy = paged()
    begin(policy, 0, 3)
    policy.fork([0], [0])
    assert policy.extend([0], [0]).room.tolist() == [1]


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ([0, 0], [1, 1], "each destination once"),
        ([0], [1, 2], "as many sources"),
        ([1], [2], "not in use"),
        ([0], [4], "no slot 4"),
    ],
)
def test_fork_arguments(src: list[int], dst: list[int], message: str) -> None:
    policy = paged()
    begin(policy, 0, 3)
    with pytest.raises(ConfigError, match=message):
        policy.fork(src, dst)
    assert policy.usage().free == 15
    policy.check_integrity()


def test_a_ring_copies_a_shared_block_before_it_overwrites_it() -> None:
    policy = paged(max_attention_window=8, sink_token_length=1)
    begin(policy, 0, 8)
    policy.fork([0], [1])
    assert policy.extend([0, 1], [0, 0]).room.tolist() == [0, 0]
    placement = policy.extend([0], [1])
    assert placement.edits.copies == ((0, placement.tables[0, 0]),)
    assert placement.room.tolist() == [3]  # entries 1, 2, 3, and then the second block, which is still shared
    policy.check_integrity()


def test_release_frees_once() -> None:
    policy = paged()
    begin(policy, 0, 6)
    policy.fork([0], [1])
    policy.release([0])
    assert policy.usage() == KVUsage(total=16, free=14)
    assert policy.length(0) == 0
    policy.release([1], keep=True)
    assert policy.usage().free == 16
    with pytest.raises(ConfigError, match="slot 1 is not in use"):
        policy.release([1])


def test_plan_forgets_all_slots() -> None:
    policy = paged()
    begin(policy, 0, 6)
    policy.plan(MODEL, KVBudget(4, 32, 4, 64))
    assert policy.usage() == KVUsage(16, 16)
    assert policy.admit(0, range(3), 0) == Admission()


def test_empty_calls() -> None:
    policy = paged()
    assert policy.extend([], []).tables.shape == (0, 8)
    policy.commit([], [])
    policy.rewind([], [])
    assert not policy.fork([], [])
    policy.release([])
    assert policy.tables([]).shape == (0, 8)
    assert policy.after_prefill([]) is None
    assert policy.evict(3) == 0


def following(window: int = 10, longest: int = 64, **options: object) -> PagedPolicy:
    policy = PagedPolicy(PagedOptions(**options))
    policy.plan(replace(MODEL, sliding_window=window), KVBudget(2, longest, 4, 2 * longest))
    return policy


def test_a_model_with_a_sliding_window_gets_a_ring_with_slack() -> None:
    plan = following()._plan
    assert (plan.window, plan.sink, plan.rewindable, plan.max_blocks_per_slot, plan.num_blocks) == (14, 0, 4, 4, 8)
    for changes in ({"longest": 14}, {"follow_sliding_window": False}):
        plan = following(**changes)._plan
        assert (plan.window, plan.rewindable) == (None, None)
    plan = following(max_attention_window=20, sink_token_length=2)._plan
    assert (plan.window, plan.sink, plan.rewindable) == (20, 2, 0)


def test_a_ring_takes_back_its_slack() -> None:
    policy = following()
    begin(policy, 0, 12, 30)
    policy.rewind([0], [10])  # nothing is lost yet
    for _ in range(28):
        policy.extend([0], [1])
        policy.commit([0], [1])
    policy.check_integrity()
    policy.rewind([0], [3])
    policy.rewind([0], [1])
    policy.check_integrity()
    with pytest.raises(ConfigError, match="slot 0: 1 tokens cannot be taken back, because its cache is a ring of 14"):
        policy.rewind([0], [1])
    policy.fork([0], [1])
    with pytest.raises(ConfigError, match="slot 1: 2 tokens cannot be taken back"):
        policy.rewind([1], [2])
    policy.extend([0], [9])
    policy.commit([0], [9])
    policy.rewind([0], [4])
    policy.check_integrity()
    policy.release([0, 1])
    assert policy.usage().free == policy.usage().total


@pytest.mark.parametrize("admission", ["worst_case", "optimistic"])
def test_who_may_grow_beside_forks(admission: str) -> None:
    """Blocks that are shared cost nothing until they are written; where nothing is promised, they count for nothing."""
    policy = paged(blocks=10, slots=4, admission=admission)
    begin(policy, 0, 4)
    for slot in (1, 2, 3):
        begin(policy, slot, 4)
    policy.extend([0], [12])
    policy.commit([0], [12])
    policy.fork([0, 0], [1, 2])  # 4 blocks, three times
    assert policy.usage().free == 5
    if admission == "worst_case":
        with pytest.raises(OutOfBlocksError):
            policy.extend([3], [4])
    else:
        policy.extend([3], [8])
        policy.commit([3], [8])
        assert policy.usage().free == 3
        with pytest.raises(OutOfBlocksError):
            policy.extend([0, 1, 2, 3], [4, 4, 4, 4])
    policy.check_integrity()
