"""A KV cache on paper: it holds what each entry stands for, and checks that every slot reads back its own text.

What a real pool holds for a token depends on the token and all before it. So an entry here holds a number that stands
for exactly that: the text up to it. Two slots may share an entry where their texts agree, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVModel, KVPlan, KVPolicy, Placement
from trtllm_core.testing.kit import require

MODEL = KVModel(num_layers=2, num_kv_heads=1, head_size=4, dtype="float32", bytes_per_token=64)


@dataclass
class Text:
    """What a slot has been given, as far as it was committed."""

    extra: tuple[Any, ...] = ()
    tokens: list[int] = field(default_factory=list)
    worst: int = 0
    """Tokens that its request may have at most; 0 for one that was only forked."""


class PaperCache:
    """Runs a policy's verbs against a pool of numbers. All of them raise ``AssertionError`` where a promise is broken.

    Edits are run as late as a backend may run them: before something is written, all of them as one.

    Args:
        policy: what is examined.
        budget: what it plans for.
        self_check: whether ``check_integrity`` is asked after each verb.
    """

    def __init__(self, policy: KVPolicy, budget: KVBudget, self_check: bool = True) -> None:
        self.policy = policy
        self.budget = budget
        self.plan: KVPlan = policy.plan(MODEL, budget)
        self.texts: dict[int, Text] = {}
        self.cache = np.full((self.plan.num_blocks, self.plan.tokens_per_block), -1, np.int64)
        self._pending = Edits()
        self._names: dict[tuple[int, Any], int] = {}
        self._self_check = self_check

    # -- verbs ---------------------------------------------------------------------------------------------------

    def admit(self, slot: int, tokens: Sequence[int], new: int, extra: tuple[Any, ...] = (), **more: Any) -> int | None:
        """Admit a prompt; returns the length of the hit, or None."""
        admission = self.policy.admit(slot, tokens, new, extra, **more)
        if admission is None:
            return None
        hit = admission.hit_length
        require(0 <= hit < len(tokens), f"admit says that {hit} of {len(tokens)} prompt tokens need not be computed")
        self._pending += admission.edits
        self.texts[slot] = Text(extra, list(tokens[:hit]), len(tokens) + new)
        self.check()
        return hit

    def write(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], kept: Sequence[int] | None = None) -> None:
        """Make room for ``tokens[i]``, write them, and commit the first ``kept[i]``; None: all of them."""
        counts = [len(new) for new in tokens]
        kept = counts if kept is None else kept
        placement = self.extend(slots, counts)
        for slot, row, new in zip(slots, placement.tables, tokens, strict=True):
            text = self.texts[slot]
            names = self._spelled(text.extra, [*text.tokens, *new])
            start = len(text.tokens)
            for position in range(start, start + len(new)):
                self.cache[self._entry(row, position)] = names[position]
        stay = [list(new[:n]) for new, n in zip(tokens, kept, strict=True)]
        self.policy.commit(slots, list(kept), *([stay] if "tokens" in self.policy.needs else []))
        for slot, new in zip(slots, stay, strict=True):
            self.texts[slot].tokens += new
        self.check()

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> Placement:
        """Ask for room, look at the answer, and run all edits."""
        placement = self.policy.extend(slots, counts)
        tables, room = placement.tables, placement.room
        shape = (len(slots), self.plan.max_blocks_per_slot)
        require(tables.shape == shape and tables.dtype == np.int32, f"extend gave tables {tables.dtype} {tables.shape}")
        require(room.shape == shape[:1] and room.dtype == np.int64, f"extend gave room {room.dtype} {room.shape}")
        short = np.flatnonzero(room < np.asarray(counts)).tolist()
        require(not short, f"extend gave slots {[slots[i] for i in short]} less room than was asked for")
        require(bool((tables == self.policy.tables(slots)).all()), "extend gave other tables than tables() does")
        self._pending += placement.edits
        self.cache, self._pending = self._edited(), Edits()
        return placement

    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Take tokens back."""
        self.policy.rewind(slots, counts)
        for slot, n in zip(slots, counts, strict=True):
            tokens = self.texts[slot].tokens
            del tokens[len(tokens) - n :]
        self.check()

    def fork(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots onto others."""
        self._pending += self.policy.fork(source, target)
        copies = [(self.texts[slot].extra, list(self.texts[slot].tokens)) for slot in source]
        for slot, (extra, tokens) in zip(target, copies, strict=True):
            worst = self.texts[slot].worst if slot in self.texts else 0
            self.texts[slot] = Text(extra, tokens, worst)
        self.check()

    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """End slots."""
        self.policy.release(slots, keep)
        for slot in slots:
            del self.texts[slot]
        self.check()

    # -- what must hold ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """All that must hold between verbs."""
        if self._self_check:
            self.policy.check_integrity()
        self.check_contents()
        self.check_writers()
        self.check_counts()

    def check_contents(self) -> None:
        """Every slot reads back its text, as far as a ring keeps it."""
        cache, plan = self._edited(), self.plan
        for slot, text in self.texts.items():
            length = self.policy.length(slot)
            require(length == len(text.tokens), f"slot {slot} has {len(text.tokens)} tokens, length() says {length}")
            (row,) = self.policy.tables([slot])
            for position, name in enumerate(self._spelled(text.extra, text.tokens)):
                gone = plan.window is not None and plan.sink <= position < length - (plan.window - plan.sink)
                if not gone:
                    found = int(cache[self._entry(row, position)])
                    require(found == name, f"slot {slot} does not read back its token {position} of {length}")

    def check_writers(self) -> None:
        """Where a slot may write, nobody else reads or writes."""
        slots = list(self.texts)
        if not slots:
            return
        room = self.policy.extend(slots, [0] * len(slots)).room.tolist()
        tables = self.policy.tables(slots)
        lengths = [len(self.texts[slot].tokens) for slot in slots]
        readers: dict[tuple[int, int], set[int]] = {}
        for slot, row, length in zip(slots, tables, lengths, strict=True):
            for position in self._readable(length):
                readers.setdefault(self._entry(row, position), set()).add(slot)
        writers: dict[tuple[int, int], int] = {}
        for slot, row, length, more in zip(slots, tables, lengths, room, strict=True):
            for entry in {self._entry(row, position) for position in range(length, length + more)}:
                other = writers.setdefault(entry, slot)
                require(other == slot, f"slots {other} and {slot} may both write entry {entry[1]} of block {entry[0]}")
                others = readers.get(entry, set()) - {slot}
                require(not others, f"slot {slot} may write where slots {sorted(others)} read")

    def check_counts(self) -> None:
        """Free and used blocks are all that there are."""
        usage, plan = self.policy.usage(), self.plan
        require(usage.total == plan.num_blocks, f"usage() counts {usage.total} blocks, the plan has {plan.num_blocks}")
        tables = self.policy.tables(list(self.texts))
        held = len(np.unique(tables[tables >= 0]))
        require(0 <= usage.cached <= usage.free, f"usage() says that {usage.cached} of {usage.free} blocks are kept")
        lost = plan.num_blocks - held - usage.free
        require(not lost, f"{held} blocks are held and {usage.free} free, of {plan.num_blocks}: {lost} are lost")

    def state(self) -> Any:
        """All that a failing call must leave as it is."""
        slots = list(self.texts)
        room = self.policy.extend(slots, [0] * len(slots)).room.tolist()
        lengths = [self.policy.length(slot) for slot in slots]
        return self.policy.tables(slots).tolist(), room, lengths, self.policy.usage()

    # -- inside --------------------------------------------------------------------------------------------------

    def _readable(self, length: int) -> Iterable[int]:
        window, sink = self.plan.window, self.plan.sink
        if window is None or length <= window:
            return range(length)
        return [*range(sink), *range(length - (window - sink), length)]

    def _entry(self, row: np.ndarray, position: int) -> tuple[int, int]:
        index, within = divmod(self.plan.cache_index(position), self.plan.tokens_per_block)
        block = int(row[index])
        require(block >= 0, f"there is no block for token {position}")
        return block, within

    def _edited(self) -> np.ndarray:
        """The cache after the pending edits: all sources are read before a destination is written."""
        cache = self.cache.copy()
        if self._pending.copies:
            source, target = zip(*self._pending.copies, strict=True)
            require(len(set(target)) == len(target), "two copies have one destination")
            cache[list(target)] = self.cache[list(source)]
        return cache

    def _spelled(self, extra: tuple[Any, ...], tokens: Iterable[int]) -> list[int]:
        """What each token of a text, with all before it, is called."""
        name = self._name(-1, extra)
        names = []
        for token in tokens:
            name = self._name(name, token)
            names.append(name)
        return names

    def _name(self, before: int, what: Any) -> int:
        return self._names.setdefault((before, what), len(self._names))
