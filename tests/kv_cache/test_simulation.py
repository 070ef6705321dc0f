"""Random use of the policies against a cache on paper: every slot must read back exactly its own text.

Planted bugs at the end show that the check can fail, with ``check_integrity`` and without.
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
from trtllm_core.kv_cache import ContiguousPolicy, PagedOptions, PagedPolicy, PrefixOptions, PrefixPolicy
from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVPolicy
from trtllm_core.testing.papercache import EVERYTHING, PaperCache

SLOTS, LONGEST = 6, 22


class PolicyMachine(RuleBasedStateMachine):
    """Random verbs. Subclasses say which policy, which sizes, and whether the policy checks itself."""

    make: Callable[[], KVPolicy]
    tokens_per_block = 4
    max_tokens = 60
    self_check = True
    worst_case = True

    def __init__(self) -> None:
        super().__init__()
        budget = KVBudget(SLOTS, LONGEST, self.tokens_per_block, self.max_tokens)
        looks = EVERYTHING if self.self_check else EVERYTHING - {"integrity"}
        self.cache = PaperCache(type(self).make(), budget, looks)
        self.policy, self.texts, self.plan = self.cache.policy, self.cache.texts, self.cache.plan
        self.tight = True
        """Whether nobody has taken back what others may share: then promises hold."""
        self.count = 100

    def live(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True))

    def tokens(self, n: int) -> list[int]:
        """Tokens that nobody else has."""
        self.count += n
        return list(range(self.count - n, self.count))

    def length(self, slot: int) -> int:
        return len(self.texts[slot].tokens)

    def refused(self, error: type[Exception], call: Callable[[], object]) -> None:
        before = self.cache.state()
        with pytest.raises(error):
            call()
        assert self.cache.state() == before, "a call that failed changed something"

    @precondition(lambda self: len(self.texts) < SLOTS)
    @rule(
        data=st.data(), prompt=st.integers(1, 12), new=st.integers(0, LONGEST - 12), salt=st.sampled_from(["", "", "x"])
    )
    def admit(self, data: st.DataObject, prompt: int, new: int, salt: str) -> None:
        slot = data.draw(st.sampled_from([slot for slot in range(SLOTS) if slot not in self.texts]))
        texts = [text.tokens for text in self.texts.values() if text.tokens]
        like = data.draw(st.sampled_from([[], [1] * 12, [1] * 7 + [2] * 5, [3] * 12, *texts]))[:prompt]
        ids = [*like, *self.tokens(prompt - len(like))]
        if min(prompt + new, self.plan.window or LONGEST) > self.plan.num_blocks * self.plan.tokens_per_block:
            self.refused(CapacityError, lambda: self.policy.admit(slot, ids, new))
            return
        before = self.cache.state()
        hit = self.cache.admit(slot, ids, new, (salt,))
        if hit is None:
            assert self.texts, "nothing is left to wait for"
            assert self.cache.state() == before, "a request that waits changed something"
            return
        self.tight = self.tight or len(self.texts) == 1
        at = data.draw(st.integers(hit + 1, prompt))
        self.write([slot], [ids[hit:at]], [at - hit])
        if at < prompt:
            self.write([slot], [ids[at:]], [prompt - at])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        slots = self.live(data)
        counts = [min(data.draw(st.integers(0, 7)), LONGEST - self.length(slot)) for slot in slots]
        # In a ring whatever is written destroys something: write only what is committed.
        kept = [n if self.plan.window else data.draw(st.integers(0, n)) for n in counts]
        self.write(slots, [self.tokens(n) for n in counts], kept)

    def write(self, slots: list[int], tokens: list[list[int]], kept: list[int]) -> None:
        safe, before = self.safe(slots, [len(new) for new in tokens]), self.cache.state()
        try:
            self.cache.write(slots, tokens, kept)
        except CapacityError:
            assert not safe, "the blocks ran out although every slot keeps within what it was promised"
            assert self.cache.state() == before, "a call that failed changed something"

    def safe(self, slots: list[int], counts: list[int]) -> bool:
        """Whether all slots keep within what admit promised them: then extend must not fail."""
        if not (self.tight and self.worst_case):
            return False
        size, most = self.plan.tokens_per_block, self.plan.window or LONGEST
        more = dict(zip(slots, counts, strict=True))
        for slot, text in self.texts.items():
            end = max(len(text.tokens) + more.get(slot, 0), 1)
            promised = -(-min(text.worst, most) // size)
            held = int((self.policy.tables([slot]) >= 0).sum())
            if max(held, -(-min(end, most) // size)) > promised:
                return False
        return True

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), n=st.integers(1, 9))
    def rewind(self, data: st.DataObject, n: int) -> None:
        slots = self.live(data)
        counts = [min(n, self.length(slot)) for slot in slots]
        window = self.plan.window
        if window and any(n and self.length(slot) > window for slot, n in zip(slots, counts, strict=True)):
            self.refused(ConfigError, lambda: self.policy.rewind(slots, counts))
            return
        self.cache.rewind(slots, counts)
        self.loosen()

    def loosen(self) -> None:
        if isinstance(self.policy, PrefixPolicy):
            self.tight = False

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        target = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
        source = [data.draw(st.sampled_from(sorted(self.texts))) for _ in target]
        self.cache.fork(source, target)
        self.loosen()

    @precondition(lambda self: len(self.texts) > 1)
    @rule(data=st.data())
    def permute(self, data: st.DataObject) -> None:
        target = self.live(data)
        self.cache.fork(data.draw(st.permutations(target)), target)
        self.loosen()

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        slots = self.live(data)
        self.cache.release(slots, keep)
        self.refused(ConfigError, lambda: self.policy.release(slots))

    @rule(n=st.integers(1, 20))
    def evict(self, n: int) -> None:
        cached = self.policy.usage().cached
        assert self.policy.evict(n) == min(n, cached)
        assert self.policy.usage().cached == cached - min(n, cached)

    @precondition(lambda self: self.texts and not self.plan.window)
    @rule()
    def scribble(self) -> None:
        """Room is the slot's own: what is written all over it hurts nobody."""
        slots = sorted(self.texts)
        room = self.cache.extend(slots, [0] * len(slots)).room.tolist()
        self.cache.write(slots, [self.tokens(n) for n in room], [0] * len(slots))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        room = int(self.policy.extend([slot], [0]).room[0])
        self.refused(ConfigError, lambda: self.policy.commit([slot], [room + 1]))
        self.refused(ConfigError, lambda: self.policy.rewind([slot], [self.length(slot) + 1]))
        self.refused(ConfigError, lambda: self.policy.extend([slot, slot], [1, 1]))
        self.refused(CapacityError, lambda: self.policy.extend([slot], [LONGEST + 1 - self.length(slot)]))

    @invariant()
    def holds(self) -> None:
        self.cache.check()

    def teardown(self) -> None:
        if self.texts:
            self.cache.release(sorted(self.texts), keep=True)
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
    "optimistic": {"make": lambda: PagedPolicy(PagedOptions(admission="optimistic")), "worst_case": False},
    "prefix": {"make": PrefixPolicy},
    "prefix, tight": {"make": PrefixPolicy, "max_tokens": 32},
    "prefix, blocks of one": {"make": PrefixPolicy, "tokens_per_block": 1, "max_tokens": 40},
    "prefix, blocks of two": {"make": PrefixPolicy, "tokens_per_block": 2, "max_tokens": 40},
    "prefix, whole blocks": {"make": lambda: PrefixPolicy(PrefixOptions(partial_blocks=False, eviction="lfu"))},
    "prefix, never waits": {"make": lambda: PrefixPolicy(PrefixOptions(wait_for_prefix=False)), "tokens_per_block": 2},
    "prefix, host": {"make": lambda: PrefixPolicy(PrefixOptions(host_tokens=24)), "max_tokens": 40},
    "prefix, host, tight": {
        "make": lambda: PrefixPolicy(PrefixOptions(host_tokens=6)),
        "tokens_per_block": 2,
        "max_tokens": 32,
    },
    "prefix, optimistic": {
        "make": lambda: PrefixPolicy(PrefixOptions(admission="optimistic", watermark=0.1)),
        "worst_case": False,
    },
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


class SharesAcrossSalts(PrefixPolicy):
    """Looks at the tokens alone."""

    def admit(self, slot: Any, tokens: Any, max_new_tokens: Any, extra_key: Any = (), **more: Any) -> Any:
        return super().admit(slot, tokens, max_new_tokens, (), **more)


class KeepsEmptyBlocks(PrefixPolicy):
    """Keeps the block after the one that is full."""

    def _keep(self, slot: int, tail: list[int]) -> None:
        self._table[slot] = np.roll(self._table[slot], -1)
        super()._keep(slot, tail)
        self._table[slot] = np.roll(self._table[slot], 1)


class SharesPartsOfBlocks(PrefixPolicy):
    """Says that a part of a block is there, but nobody copies it."""

    def _reuse_part(self, *args: Any) -> Any:
        return super()._reuse_part(*args)[0], Edits()


class WritesKept(PrefixPolicy):
    """Writes over what was kept, after a rewind."""

    def _limits(self, rows: Any) -> Any:
        return np.minimum(self._held[rows] * self._tokens_per_block, self._longest)


class ForgetsRewinds(PrefixPolicy):
    """Keeps blocks under tokens that were taken back."""

    def rewind(self, slots: Any, counts: Any) -> None:
        before = list(self._node), [list(tail) for tail in self._tail]
        super().rewind(slots, counts)
        self._node, self._tail = before


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
        (SharesAcrossSalts, {}),
        (KeepsEmptyBlocks, {}),
        (SharesPartsOfBlocks, {}),
        (WritesKept, {"tokens_per_block": 2}),
        (ForgetsRewinds, {"tokens_per_block": 2}),
    ],
)
def test_planted_bug_is_caught(policy: type[PagedPolicy], members: dict[str, Any], self_check: bool) -> None:
    options = members.get("options")
    rest = {name: value for name, value in members.items() if name != "options"}
    with pytest.raises((AssertionError, LookupError, pytest.fail.Exception)):
        run(300, (Phase.generate,), make=lambda: policy(options), self_check=self_check, **rest)
