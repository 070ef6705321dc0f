"""Random use of the policies against a backend of NumPy: every slot must read back exactly what it wrote.

The pool holds, for each entry, the tokens' (writer, position, value); the policy's edits are applied to it as a
backend would. Planted bugs at the end show that the check can fail, with ``check_integrity`` and without.
``KV_EXAMPLES`` in the environment is the number of random runs of each case.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import ContiguousPolicy, PagedOptions, PagedPolicy
from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVModel, KVPlan, KVPolicy

MODEL = KVModel(num_layers=2, num_kv_heads=1, head_size=4, dtype="float32", bytes_per_token=64)
SLOTS, LONGEST = 6, 22

Token = tuple[int, int, int]


class Backend:
    """A pool of entries that does what edits say, and a text for each slot: what it should read back."""

    def __init__(self, policy: KVPolicy, tokens_per_block: int, max_tokens: int) -> None:
        self.policy = policy
        self.plan: KVPlan = policy.plan(MODEL, KVBudget(SLOTS, LONGEST, tokens_per_block, max_tokens))
        self.cache = np.full((self.plan.num_blocks, tokens_per_block, 3), -1)
        self.texts: dict[int, list[Token]] = {}
        self.worst: dict[int, int] = {}
        self.pending = Edits()
        self.writes = 0

    def write(self, slots: list[int], counts: list[int], kept: list[int]) -> None:
        """Extend, write ``counts`` tokens, commit the first ``kept`` of them."""
        placement = self.policy.extend(slots, counts)
        assert (placement.room >= counts).all()
        self.pending += placement.edits
        self.cache, self.pending = self.edited(), Edits()
        for slot, row, count, keep in zip(slots, placement.tables, counts, kept, strict=True):
            start = len(self.texts[slot])
            tokens = [self.put(row, slot, start + i) for i in range(count)]
            self.texts[slot] += tokens[:keep]
        self.policy.commit(slots, kept)

    def put(self, row: np.ndarray, slot: int, position: int) -> Token:
        self.writes += 1
        token = (slot, position, self.writes)
        entry = self.plan.cache_index(position)
        block = row[entry // self.plan.tokens_per_block]
        assert block >= 0, "the room has no block"
        self.cache[block, entry % self.plan.tokens_per_block] = token
        return token

    def edited(self) -> np.ndarray:
        """The cache after the pending edits: all sources are read before a destination is written."""
        cache = self.cache.copy()
        if self.pending.copies:
            source, target = zip(*self.pending.copies, strict=True)
            assert len(set(target)) == len(target)
            cache[list(target)] = self.cache[list(source)]
        return cache

    def check(self) -> None:
        """Every slot reads back what its text says, as far as a ring keeps it."""
        cache, plan = self.edited(), self.plan
        for slot, text in self.texts.items():
            assert self.policy.length(slot) == len(text)
            (row,) = self.policy.tables([slot])
            for position, token in enumerate(text):
                gone = plan.window is not None and plan.sink <= position < len(text) - (plan.window - plan.sink)
                if not gone:
                    entry = plan.cache_index(position)
                    found = tuple(cache[row[entry // plan.tokens_per_block], entry % plan.tokens_per_block])
                    assert found == token, f"slot {slot}, token {position}: {found}, not {token}"

    def state(self) -> Any:
        """All that a failing call must leave as it is."""
        slots = list(self.texts)
        placement = self.policy.extend(slots, [0] * len(slots))
        lengths = [self.policy.length(slot) for slot in slots]
        return placement.tables.tolist(), placement.room.tolist(), lengths, self.policy.usage()

    def safe(self, slots: list[int], counts: list[int]) -> bool:
        """Whether all slots keep within what admit promised them: then extend must not fail."""
        tpb = self.plan.tokens_per_block
        for slot in self.texts:
            end = max(len(self.texts[slot]) + dict(zip(slots, counts, strict=True)).get(slot, 0), 1)
            promised = -(-min(self.worst.get(slot, 0), self.plan.window or LONGEST) // tpb)
            held = int((self.policy.tables([slot]) >= 0).sum())
            if max(held, -(-min(end, self.plan.window or LONGEST) // tpb)) > promised:
                return False
        return True


class PolicyMachine(RuleBasedStateMachine):
    """Random verbs. Subclasses say which policy, which sizes, and whether the policy checks itself."""

    make: Callable[[], KVPolicy]
    tokens_per_block = 4
    max_tokens = 60
    self_check = True

    def __init__(self) -> None:
        super().__init__()
        self.backend = Backend(type(self).make(), self.tokens_per_block, self.max_tokens)
        self.policy, self.texts = self.backend.policy, self.backend.texts

    def live(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True))

    def refused(self, error: type[Exception], call: Callable[[], object]) -> None:
        before = self.backend.state()
        with pytest.raises(error):
            call()
        assert self.backend.state() == before, "a call that failed changed something"

    @precondition(lambda self: len(self.texts) < SLOTS)
    @rule(data=st.data(), prompt=st.integers(1, 12), new=st.integers(0, LONGEST - 12))
    def admit(self, data: st.DataObject, prompt: int, new: int) -> None:
        slot = data.draw(st.sampled_from([slot for slot in range(SLOTS) if slot not in self.texts]))
        plan = self.backend.plan
        if min(prompt + new, plan.window or LONGEST) > plan.num_blocks * plan.tokens_per_block:
            self.refused(CapacityError, lambda: self.policy.admit(slot, range(prompt), new))
        elif self.policy.admit(slot, range(prompt), new) is not None:
            self.texts[slot] = []
            self.backend.worst[slot] = prompt + new
            self.write([slot], [prompt], [prompt])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        slots = self.live(data)
        left = [LONGEST - len(self.texts[slot]) for slot in slots]
        counts = [min(data.draw(st.integers(0, 7)), room) for room in left]
        # In a ring whatever is written destroys something: write only what is committed.
        kept = [n if self.backend.plan.window else data.draw(st.integers(0, n)) for n in counts]
        self.write(slots, counts, kept)

    def write(self, slots: list[int], counts: list[int], kept: list[int]) -> None:
        safe, before = self.backend.safe(slots, counts), self.backend.state()
        try:
            self.backend.write(slots, counts, kept)
        except CapacityError:
            assert not safe, "the blocks ran out although every slot keeps within what it was promised"
            assert self.backend.state() == before, "a call that failed changed something"

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), n=st.integers(1, 9))
    def rewind(self, data: st.DataObject, n: int) -> None:
        slots = self.live(data)
        counts = [min(n, len(self.texts[slot])) for slot in slots]
        window = self.backend.plan.window
        if window and any(n and len(self.texts[slot]) > window for slot, n in zip(slots, counts, strict=True)):
            self.refused(ConfigError, lambda: self.policy.rewind(slots, counts))
            return
        self.policy.rewind(slots, counts)
        for slot, n in zip(slots, counts, strict=True):
            del self.texts[slot][len(self.texts[slot]) - n :]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        target = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
        source = [data.draw(st.sampled_from(sorted(self.texts))) for _ in target]
        self.fork_all(source, target)

    @precondition(lambda self: len(self.texts) > 1)
    @rule(data=st.data())
    def permute(self, data: st.DataObject) -> None:
        target = self.live(data)
        self.fork_all(data.draw(st.permutations(target)), target)

    def fork_all(self, source: list[int], target: list[int]) -> None:
        self.backend.pending += self.policy.fork(source, target)
        texts = [list(self.texts[slot]) for slot in source]
        self.texts.update(zip(target, texts, strict=True))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slots = self.live(data)
        self.policy.release(slots)
        for slot in slots:
            del self.texts[slot]
            self.backend.worst.pop(slot, None)
        self.refused(ConfigError, lambda: self.policy.release(slots))

    @precondition(lambda self: self.texts and not self.backend.plan.window)
    @rule()
    def scribble(self) -> None:
        """Room is the slot's own: garbage all over it hurts nobody."""
        slots = sorted(self.texts)
        placement = self.policy.extend(slots, [0] * len(slots))
        self.backend.cache, self.backend.pending = self.backend.edited(), Edits()
        for slot, row, room in zip(slots, placement.tables, placement.room.tolist(), strict=True):
            for position in range(len(self.texts[slot]), len(self.texts[slot]) + room):
                self.backend.put(row, slot, position)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        room = int(self.policy.extend([slot], [0]).room[0])
        self.refused(ConfigError, lambda: self.policy.commit([slot], [room + 1]))
        self.refused(ConfigError, lambda: self.policy.rewind([slot], [len(self.texts[slot]) + 1]))
        self.refused(ConfigError, lambda: self.policy.extend([slot, slot], [1, 1]))
        self.refused(CapacityError, lambda: self.policy.extend([slot], [LONGEST + 1 - len(self.texts[slot])]))

    @invariant()
    def holds(self) -> None:
        if self.self_check:
            self.policy.check_integrity()
        self.backend.check()

    def teardown(self) -> None:
        if self.texts:
            self.policy.release(sorted(self.texts))
        usage = self.policy.usage()
        assert usage.free == usage.total, "blocks leaked"


CASES: dict[str, dict[str, Any]] = {
    "paged": {"make": PagedPolicy},
    "paged, tight": {"make": PagedPolicy, "max_tokens": 32},
    "paged, blocks of one": {"make": PagedPolicy, "tokens_per_block": 1},
    "paged, one block a slot": {"make": PagedPolicy, "tokens_per_block": 32, "max_tokens": 32 * 5},
    "ring that fills the pool": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=16)), "max_tokens": 16},
    "paged, smaller than a slot": {"make": PagedPolicy, "max_tokens": 16},
    "watermark": {"make": lambda: PagedPolicy(PagedOptions(watermark=0.3))},
    "ring": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=8))},
    "ring, uneven": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=10))},
    "ring with sinks": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=12, sink_token_length=4))},
    "ring with uneven sinks": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=11, sink_token_length=3))},
    "ring of one": {"make": lambda: PagedPolicy(PagedOptions(max_attention_window=6, sink_token_length=5))},
    "contiguous": {"make": ContiguousPolicy, "max_tokens": SLOTS * 24},
    "contiguous rows": {"make": ContiguousPolicy, "tokens_per_block": LONGEST, "max_tokens": SLOTS * LONGEST},
}


def run(examples: int, phases: tuple[Phase, ...] = tuple(Phase), **members: Any) -> None:
    members["make"] = staticmethod(members["make"])
    machine = type("Machine", (PolicyMachine,), members)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", CASES)
def test_every_slot_reads_back_what_it_wrote(name: str) -> None:
    run(int(os.environ.get("KV_EXAMPLES", "20")), **CASES[name])


class WritesShared(PagedPolicy):
    """Room does not look at owners, so that nothing is copied on write."""

    def _limits(self, rows: Any) -> Any:
        return np.minimum(self._held[rows] * self._tokens_per_block, self._longest)


class ForgetsCopies(PagedPolicy):
    """New blocks instead of shared ones, but nobody copies the contents."""

    def _make_room(self, rows: Any, want: Any) -> Edits:
        super()._make_room(rows, want)
        return Edits()


class FreesTwice(PagedPolicy):
    """Gives the first block of a released slot back twice."""

    def release(self, slots: Any, keep: bool = False) -> None:
        first = self._table[self._rows(slots), 0]
        super().release(slots, keep)
        self._pool.drop(first[first >= 0])


class Leaks(PagedPolicy):
    """Forgets the blocks of a destination of fork."""

    def fork(self, src: Any, dst: Any) -> Edits:
        self._table[[target for source, target in zip(src, dst, strict=True) if source not in dst]] = -1
        return super().fork(src, dst)


class ForksOneByOne(PagedPolicy):
    """0←1, 1←0 leaves both equal."""

    def fork(self, src: Any, dst: Any) -> Edits:
        for source, target in zip(src, dst, strict=True):
            super().fork([source], [target])
        return Edits()


class SharesReserve(PagedPolicy):
    """Shares blocks that were reserved and are empty, and leaves the room."""

    def fork(self, src: Any, dst: Any) -> Edits:
        length = self._length.copy()
        self._length = np.maximum(self._length, self._held * self._tokens_per_block)
        super().fork(src, dst)
        self._length = length
        self._length[list(dst)] = length[list(src)]
        return Edits()


class RewindsRings(PagedPolicy):
    """Takes tokens back that a ring has overwritten."""

    def rewind(self, slots: Any, counts: Any) -> None:
        self._length[list(slots)] -= np.asarray(counts)


class StopsHalfWay(PagedPolicy):
    """Takes blocks slot by slot, and raises when they run out."""

    def _make_room(self, rows: Any, want: Any) -> Edits:
        edits = Edits()
        for i in range(len(rows)):
            edits += super()._make_room(rows[i : i + 1], want[i : i + 1])
        return edits


class BreaksPromises(PagedPolicy):
    """Admits whatever fits in the free blocks now."""

    def _unpromised(self) -> int:
        return self._pool.free


RING = {"options": PagedOptions(max_attention_window=10, sink_token_length=2)}


@pytest.mark.parametrize("self_check", [True, False], ids=["integrity", "contents alone"])
@pytest.mark.parametrize(
    ("policy", "members"),
    [
        (WritesShared, {"tokens_per_block": 2}),
        (ForgetsCopies, {}),
        (ForgetsCopies, RING),
        (FreesTwice, {"max_tokens": 32}),
        (Leaks, {}),
        (ForksOneByOne, {}),
        (SharesReserve, {"tokens_per_block": 2}),
        (RewindsRings, RING),
        (StopsHalfWay, {"max_tokens": 32}),
        (BreaksPromises, {"max_tokens": 24}),
    ],
)
def test_planted_bug_is_caught(policy: type[PagedPolicy], members: dict[str, Any], self_check: bool) -> None:
    options = members.get("options")
    rest = {name: value for name, value in members.items() if name != "options"}
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception)):
        run(300, (Phase.generate,), make=lambda: policy(options), self_check=self_check, **rest)
