"""The prefix policy: what is found again, what is given up, and what a request is promised."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import PrefixOptions, PrefixPolicy
from trtllm_core.plugin import CachedBlock, EvictionOrder
from trtllm_core.plugin.kv_policy import Edits, KVBudget, OutOfBlocksError
from trtllm_core.testing.papercache import PaperCache


def prefix(blocks: int = 16, slots: int = 4, longest: int = 64, tpb: int = 4, **options: Any) -> PaperCache:
    return PaperCache(PrefixPolicy(PrefixOptions(**options)), KVBudget(slots, longest, tpb, blocks * tpb))


def run(cache: PaperCache, slot: int, tokens: list[int], new: int = 0, **more: Any) -> int | None:
    """Admit a request and compute its prompt. Returns the hit."""
    hit = cache.admit(slot, tokens, new, **more)
    if hit is not None:
        cache.write([slot], [tokens[hit:]])
    return hit


def ids(*parts: tuple[int, int]) -> list[int]:
    """``ids((7, 3), (1, 2))`` is ``[7, 7, 7, 1, 1]``."""
    return [token for token, n in parts for _ in range(n)]


def test_full_blocks_are_found_again_while_and_after_their_request_lives() -> None:
    cache = prefix(partial_blocks=False)
    assert run(cache, 0, ids((1, 9), (2, 4))) == 0
    assert run(cache, 1, ids((1, 9), (3, 4))) == 8
    assert cache.policy.usage().shared == 2
    cache.release([0, 1], keep=True)
    assert cache.policy.usage().cached == 4
    assert run(cache, 2, ids((1, 9), (2, 3), (5, 5))) == 12
    assert run(cache, 3, ids((2, 9))) == 0


def test_generated_tokens_are_found_again() -> None:
    cache = prefix()
    run(cache, 0, [1, 2, 3], 20)
    cache.write([0], [[4, 5]])
    cache.write([0], [[6, 7, 8, 9]])
    cache.release([0], keep=True)
    assert run(cache, 1, [1, 2, 3, 4, 5, 6, 7, 8, 50, 51]) == 8


def test_at_least_one_token_is_computed() -> None:
    cache = prefix()
    run(cache, 0, ids((1, 8)))
    assert run(cache, 1, ids((1, 8))) == 7
    cache = prefix(partial_blocks=False)
    run(cache, 0, ids((1, 8)))
    assert run(cache, 1, ids((1, 8))) == 4
    assert run(cache, 2, [1]) == 0


def test_the_beginning_of_a_block_is_copied() -> None:
    cache = prefix(tpb=8)
    run(cache, 0, ids((1, 20), (2, 4)))
    assert run(cache, 1, ids((1, 20), (3, 4))) == 20
    assert cache.policy.usage().shared == 2
    assert run(cache, 2, [2, *ids((1, 9))]) == 0
    assert run(cache, 3, ids((1, 17), (4, 2))) == 16, "one token is not worth a copy"


def test_nothing_is_shared_under_another_key() -> None:
    cache = prefix()
    run(cache, 0, ids((1, 9)), extra=("adapter", "a"))
    assert run(cache, 1, ids((1, 9)), extra=("adapter", "b")) == 0
    assert run(cache, 2, ids((1, 9))) == 0
    assert run(cache, 3, ids((1, 9)), extra=("adapter", "a")) == 8


def test_what_did_not_end_well_is_not_kept() -> None:
    cache = prefix()
    run(cache, 0, ids((1, 8), (2, 4)))
    cache.release([0], keep=True)
    assert run(cache, 0, ids((1, 8), (3, 8))) == 8
    cache.release([0])
    assert cache.policy.usage().cached == 3, "what it found is still there"
    assert run(cache, 0, ids((1, 8), (3, 8))) == 8


def test_tokens_that_nobody_knows_are_not_kept() -> None:
    policy = PrefixPolicy()
    policy.plan(PaperCache(PrefixPolicy(), KVBudget(1, 8, 4, 8)).plan.model, KVBudget(2, 16, 4, 32))
    policy.admit(0, [1] * 9, 4)
    policy.extend([0], [9])
    policy.commit([0], [9])
    policy.commit([0], [0], [[]])
    policy.release([0], keep=True)
    assert policy.usage().cached == 0


def test_of_those_that_begin_alike_one_computes() -> None:
    cache = prefix(partial_blocks=False)
    prompt = ids((1, 9))
    assert cache.admit(0, prompt, 0) == 0
    assert cache.admit(1, prompt, 0) is None
    assert cache.admit(1, ids((2, 9)), 0) == 0, "who begins otherwise does not wait"
    cache.write([0], [prompt[:4]])
    assert cache.admit(2, prompt[:6], 0) == 4, "what it can use is there"
    assert cache.admit(3, prompt, 0) is None
    cache.write([0], [prompt[4:]])
    assert cache.admit(3, prompt, 0) == 8
    cache.release([1])
    assert cache.admit(1, ids((2, 9)), 0) == 0, "who computed is gone"


def test_all_compute_where_nobody_shall_wait() -> None:
    cache = prefix(wait_for_prefix=False)
    prompt = ids((1, 9))
    assert [cache.admit(slot, prompt, 0) for slot in range(3)] == [0, 0, 0]
    cache.write([0, 1, 2], [prompt] * 3)
    assert cache.policy.usage().cached == 0
    cache.release([0, 1, 2], keep=True)
    assert cache.policy.usage().cached == 2, "one of each is kept"


def test_rewinds_and_forks_keep_texts_apart() -> None:
    cache = prefix()
    run(cache, 0, ids((1, 9)), 20)
    cache.rewind([0], [6])
    cache.fork([0], [1])
    cache.write([0, 1], [ids((2, 6)), ids((3, 6))])
    cache.release([0, 1], keep=True)
    for tail, hit in ((1, 8), (2, 8), (3, 8)):
        assert run(cache, 0, ids((1, 3), (tail, 6))) == hit
        cache.release([0], keep=True)


def give_up(order: Any) -> list[int]:
    """Which of four kept sequences of one block each are left, one after another, as blocks are given up."""
    cache = prefix(eviction=order)
    for token, priority in ((1, 10), (2, 90), (3, 50), (4, 50)):
        keywords = {"priority": priority} if cache.policy.honours_priority else {}
        run(cache, 0, ids((token, 5)), **keywords)
        cache.release([0], keep=True)
    for token in (1, 1, 2, 3):  # found again
        run(cache, 0, ids((token, 5)), **({"priority": 0} if cache.policy.honours_priority else {}))
        cache.release([0], keep=True)
    gone = []
    tree = cache.policy._tree
    for _ in range(4):
        before = {node.key[0] for node in tree._nodes if node}
        assert cache.policy.evict(1) == 1
        gone += before - {node.key[0] for node in tree._nodes if node}
    return gone


class Newest(EvictionOrder):
    """What a third party would write."""

    def key(self, block: CachedBlock) -> Any:
        return -block.created


def test_eviction_orders() -> None:
    assert give_up("lru") == [4, 1, 2, 3]
    assert give_up("fifo") == [1, 2, 3, 4]
    assert give_up("lfu") == [4, 2, 3, 1]
    assert give_up("priority") == [1, 4, 3, 2], "the highest that a request gave it"
    assert give_up(Newest) == [4, 3, 2, 1]


def test_the_end_of_a_sequence_goes_first_and_what_is_used_never() -> None:
    cache = prefix(eviction=Newest)
    run(cache, 0, ids((1, 13)))
    run(cache, 1, ids((1, 8), (2, 5)))
    cache.release([0], keep=True)
    assert cache.policy.evict(9) == 1
    cache.release([1], keep=True)
    assert run(cache, 0, ids((1, 13))) == 8


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("mru", "no eviction order 'mru': choose 'fifo', 'lfu', 'lru', 'priority'"),
        ("collections:Counter", "is a Counter, not an EvictionOrder"),
        ("collections:Nothing", "could not be made: AttributeError"),
        ("no_such_module:Order", "could not be made: ModuleNotFoundError"),
    ],
)
def test_an_order_that_is_none_is_refused(order: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixPolicy(PrefixOptions(eviction=order))


def test_an_order_is_found_by_reference() -> None:
    policy = PrefixPolicy(PrefixOptions(eviction="trtllm_core.kv_cache.orders:LowestPriority"))
    assert policy.honours_priority
    assert not PrefixPolicy().honours_priority


def test_kept_blocks_make_room() -> None:
    cache = prefix(blocks=6)
    for token in (1, 2, 3):
        run(cache, 0, ids((token, 8)))
        cache.release([0], keep=True)
    usage = cache.policy.usage()
    assert (usage.total, usage.free, usage.cached) == (6, 6, 6)
    assert run(cache, 0, ids((9, 16)), 4) == 0
    assert cache.policy.usage().cached == 2
    assert run(cache, 1, ids((3, 8))) is None, "one of the two is promised"
    with pytest.raises(CapacityError, match="the whole pool has 24"):
        cache.admit(2, ids((9, 16)), 10)


def test_an_inner_block_goes_where_the_rest_is_held() -> None:
    """Two computed the same block; the second one's next block hangs below the first one's."""
    cache = prefix(blocks=8, slots=3, wait_for_prefix=False)
    for slot in (0, 1):
        cache.admit(slot, ids((1, 5)), 8)
    cache.write([0, 1], [ids((1, 4))] * 2)
    cache.write([1], [ids((2, 4))])
    cache.release([0], keep=True)
    assert cache.policy.usage().cached == 1
    assert cache.policy.evict(1) == 1
    cache.write([1], [ids((3, 5))])
    cache.release([1], keep=True)
    assert cache.policy.usage().cached == 0, "what follows a block that is gone cannot be found"


def test_shared_blocks_are_counted_once() -> None:
    cache = prefix(blocks=8, partial_blocks=False)
    prompt = ids((1, 16))
    run(cache, 0, [*prompt, 5], 3)
    assert [run(cache, slot, [*prompt, 6], 3) for slot in (1, 2)] == [16, 16]
    assert cache.admit(3, [*prompt, 7], 7) is None, "one block is left, and it may need two"
    assert cache.admit(3, [*prompt, 7], 3) == 16


class PromisesTwice(PrefixPolicy):
    """Forgets that blocks which are shared are held, too."""

    def _unpromised(self, hits: Any = None) -> int:
        promised = self._promised > 0
        return len(self._pool) - int((np.maximum(self._promised, self._held) - self._covered)[promised].sum())


def keep_busy(policy: PrefixPolicy, seed: int) -> int:
    """Requests of a few beginnings come, generate all that they may, and go. Returns how many tokens were reused."""
    rng = random.Random(seed)
    cache = PaperCache(policy, KVBudget(4, 40, 4, 60))
    left: dict[int, list[int]] = {}
    reused = 0
    for number in range(40):
        slot = next((slot for slot in range(4) if slot not in left), None)
        prompt = [rng.randrange(3)] * rng.randrange(1, 18) + [1000 + number] * rng.randrange(1, 4)
        new = rng.randrange(8)
        if slot is not None and (hit := cache.admit(slot, prompt, new)) is not None:
            left[slot] = [*prompt[hit:], *range(2000 + 10 * number, 2000 + 10 * number + new)]
            reused += hit
        for slot in list(left):
            n = rng.randrange(10)
            cache.write([slot], [left[slot][:n]])
            del left[slot][:n]
            if not left[slot]:
                cache.release([slot], keep=True)
                del left[slot]
    return reused


def test_a_promise_is_kept() -> None:
    assert sum(keep_busy(PrefixPolicy(), seed) for seed in range(10)) > 500
    with pytest.raises(OutOfBlocksError):
        sum(keep_busy(PromisesTwice(), seed) for seed in range(10))


def test_copies_of_several_admissions() -> None:
    cache = prefix(blocks=4, slots=3)
    run(cache, 0, ids((1, 4)))
    cache.release([0], keep=True)
    assert cache.admit(0, ids((1, 4)), 0) == 3
    assert cache.admit(1, ids((1, 3), (2, 1)), 0) == 3
    cache.write([0, 1], [[1], [2]])


def test_a_source_that_must_make_room_for_its_copy_is_taken_over() -> None:
    cache = prefix(blocks=1, slots=1)
    run(cache, 0, ids((1, 4)))
    cache.release([0], keep=True)
    admission = cache.policy.admit(0, ids((1, 3), (2, 1)), 0)
    assert admission is not None
    assert (admission.hit_length, admission.edits) == (3, Edits())
