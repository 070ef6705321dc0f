"""How long the verbs take. Printed, not asserted: see it with ``pytest -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from trtllm_core.kv_cache import PagedPolicy
from trtllm_core.plugin.kv_policy import KVBudget, KVModel

SLOTS = 256


def test_256_slots() -> None:
    policy = PagedPolicy()
    policy.plan(KVModel(32, 8, 128, "bfloat16", 131072), KVBudget(SLOTS, 2048, 64, SLOTS * 2048))
    slots, ones = np.arange(SLOTS), np.ones(SLOTS, np.int64)
    for slot in range(SLOTS):
        # The slots end at different places in their blocks, so that each step a few of them need a new one.
        policy.admit(slot, range(512 + slot % 64), 1400)
        policy.extend([slot], [512 + slot % 64])
        policy.commit([slot], [512 + slot % 64])

    def step() -> None:
        policy.extend(slots, ones)  # type: ignore[arg-type]
        policy.commit(slots, ones)  # type: ignore[arg-type]

    def beam_step() -> None:
        policy.fork(slots // 4 * 4, slots)  # type: ignore[arg-type]
        step()

    report("extend + commit", step, 256)
    report("fork 0←1, 1←0", lambda: policy.fork(slots ^ 1, slots), 64)  # type: ignore[arg-type]
    report("fork onto 4 beams, extend with copies, commit", beam_step, 64)
    report("check_integrity", policy.check_integrity, 4)


def report(what: str, call: Callable[[], object], times: int) -> None:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    print(f"{what}, {SLOTS} slots: median {statistics.median(taken) * 1e6:.0f} µs, least {min(taken) * 1e6:.0f} µs")
