"""How long the verbs take. Printed, not asserted: see it with ``pytest -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trtllm_core.config import BuildConfig
from trtllm_core.kv_cache import PagedPolicy, PrefixPolicy
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin.kv_policy import KVBudget, KVModel
from trtllm_core.testing.markov import MarkovExecutable

SLOTS = 256


@pytest.mark.parametrize("policy", [PagedPolicy(), PrefixPolicy()], ids=["paged", "prefix"])
def test_256_slots(policy: PagedPolicy) -> None:
    policy.plan(KVModel(32, 8, 128, "bfloat16", 131072), KVBudget(SLOTS, 2048, 64, SLOTS * 2048))
    slots, ones = np.arange(SLOTS), np.ones(SLOTS, np.int64)
    known = "tokens" in policy.needs

    def commit(slots: Any, tokens: Any) -> None:
        policy.commit(slots, [len(new) for new in tokens], *([tokens] if known else []))

    def admit(slot: int) -> None:
        # The slots end at different places in their blocks, so that each step a few of them need a new one.
        prompt = [slot // 4] * 448 + [slot] * (64 + slot % 64)
        admission = policy.admit(slot, prompt, 1400)
        assert admission is not None
        rest = prompt[admission.hit_length :]
        policy.extend([slot], [len(rest)])
        commit([slot], [rest])

    for slot in range(SLOTS):
        admit(slot)

    def step() -> None:
        policy.extend(slots, ones)  # type: ignore[arg-type]
        commit(slots, [[7]] * SLOTS)

    def beam_step() -> None:
        policy.fork(slots // 4 * 4, slots)  # type: ignore[arg-type]
        step()

    def again() -> None:
        policy.release([5], keep=True)
        admit(5)

    print(f"\n{type(policy).__name__}")
    report("extend + commit", step, 256)
    report("fork 0←1, 1←0", lambda: policy.fork(slots ^ 1, slots), 64)  # type: ignore[arg-type]
    report("fork onto 4 beams, extend with copies, commit", beam_step, 64)
    report("release and admit of one", again, 64)
    report("check_integrity", policy.check_integrity, 4)


@pytest.mark.parametrize("policy", [PagedPolicy(), PrefixPolicy()], ids=["paged", "prefix"])
def test_the_cache_of_a_loop_in_steps_for_which_there_is_room(policy: PagedPolicy) -> None:
    """As the loop calls it. The policy hears of none of them."""
    build = BuildConfig(max_batch_size=SLOTS, max_input_len=128, max_seq_len=2048, tokens_per_block=64)
    history = np.zeros((SLOTS, 2048), np.int32)
    cache = KVCache(policy, MarkovExecutable(build=build), KVBudget(SLOTS, 2048, 64, SLOTS * 2048), history)
    for slot in range(SLOTS):
        assert cache.admit(slot, [slot] * 65, 1400) is not None
    slots, ones = np.arange(SLOTS), np.ones(SLOTS, np.int64)
    cache.extend(slots, 65 * ones)
    cache.commit(slots, 65 * ones)
    reported = policy.length(0)

    def step() -> None:
        cache.extend(slots, ones)  # the scheduler's, and the step's own
        cache.extend(slots, ones)
        cache.commit(slots, ones)
        cache.settle(slots, ones)

    print(f"\n{type(policy).__name__} in a loop")
    report("a steady step", step, 60)
    assert (cache.cached == 125).all()
    assert policy.length(0) == reported


def report(what: str, call: Callable[[], object], times: int) -> None:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    print(f"{what}, {SLOTS} slots: median {statistics.median(taken) * 1e6:.0f} µs, least {min(taken) * 1e6:.0f} µs")
