"""A KV cache on paper: it holds what each entry stands for, and checks that every slot reads back its own text.

What a real pool holds for a token depends on the token and all before it. So an entry here holds a number that stands
for exactly that: the text up to it. Two slots may share an entry where their texts agree, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trtllm_core.kv_cache.offered import settles
from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVModel, KVPlan, KVPolicy, KVStatistics, Placement
from trtllm_core.testing.kit import require

LAYERS = 2
MODEL = KVModel(num_layers=LAYERS, num_kv_heads=1, head_size=4, dtype="float32", bytes_per_token=64)
EVERYTHING = frozenset({"integrity", "contents", "writers", "counts"})
"""What a paper cache can look at after each verb."""


@dataclass
class Text:
    """What a slot has been given, as far as it was committed."""

    extra: tuple[Any, ...] = ()
    tokens: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    """What an entry holds that stands for each of the tokens."""
    held: np.ndarray = field(default_factory=lambda: np.zeros((LAYERS, 0), np.int64))
    """By layer, what its entries hold: ``names``, until a policy moves and drops some."""
    prompt: int = 0
    worst: int = 0
    """Tokens that its request may have at most; 0 for one that was only forked."""


class PaperCache:
    """Runs a policy's verbs against a pool of numbers. All of them raise ``AssertionError`` where a promise is broken.

    Edits are run as late as a backend may run them: before something is written, all of them as one.

    Args:
        policy: what is examined.
        budget: what it plans for.
        looks: what is looked at after each verb, of ``EVERYTHING``.
    """

    def __init__(self, policy: KVPolicy, budget: KVBudget, looks: Collection[str] = EVERYTHING) -> None:
        self.policy = policy
        self.budget = budget
        self.plan: KVPlan = policy.plan(MODEL, budget)
        self.texts: dict[int, Text] = {}
        self.cache = np.full((LAYERS, self.plan.num_blocks, self.plan.tokens_per_block), -1, np.int64)
        self.host = np.full((LAYERS, self.plan.host_blocks, self.plan.tokens_per_block), -1, np.int64)
        self._pending = Edits()
        self._names: dict[tuple[int, Any], int] = {}
        self._places = np.array([self.plan.cache_index(position) for position in range(budget.max_seq_len)])
        self._looks = looks
        self._random = np.random.default_rng(0)
        self._settles = settles(policy)

    # -- verbs ---------------------------------------------------------------------------------------------------

    def admit(self, slot: int, tokens: Sequence[int], new: int, extra: tuple[Any, ...] = (), **more: Any) -> int | None:
        """Admit a prompt; returns the length of the hit, or None."""
        admission = self.policy.admit(slot, tokens, new, extra, **more)
        if admission is None:
            return None
        hit = admission.hit_length
        require(
            0 <= hit <= max(len(tokens) - 1, 0),
            f"admit says that {hit} of {len(tokens)} prompt tokens need not be computed",
        )
        self._later(admission.edits)
        known = list(tokens[:hit])
        names = self._spelled(extra, [], known)
        held = np.tile(np.array(names, np.int64), (LAYERS, 1))
        self.texts[slot] = Text(extra, known, names, held, len(tokens), len(tokens) + new)
        self.check()
        return hit

    def write(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], kept: Sequence[int] | None = None) -> None:
        """Make room for ``tokens[i]``, write them, and commit the first ``kept[i]``; None: all of them."""
        counts = [len(new) for new in tokens]
        kept = counts if kept is None else kept
        placement = self.extend(slots, counts)
        names: dict[int, list[int]] = {}
        for slot, row, new in zip(slots, placement.tables, tokens, strict=True):
            text = self.texts[slot]
            names[slot] = self._spelled(text.extra, text.names, new)
            start = text.held.shape[1]
            entries = self._entries(row, np.arange(start, start + len(new)))
            for entry, name in zip(entries.tolist(), names[slot], strict=True):  # one after another, as a ring may wrap
                self._flat[:, entry] = name
        stay = [list(new[:n]) for new, n in zip(tokens, kept, strict=True)]
        self.policy.commit(slots, list(kept), *([stay] if "tokens" in self.policy.needs else []))
        for slot, new in zip(slots, stay, strict=True):
            self.texts[slot].tokens += new
            text, more = self.texts[slot], names[slot][: len(new)]
            text.names += more
            text.held = np.hstack((text.held, np.tile(np.array(more, np.int64), (LAYERS, 1))))
        if self._settles:
            self._settle([(slot, len(new)) for slot, new in zip(slots, stay, strict=True) if new])
        self.check()

    def _settle(self, written: Sequence[tuple[int, int]]) -> None:
        """A step is over: the policy hears of it, and what it moves and drops is done."""
        for slot, count in written:  # one at a time, with scores at random
            text = self.texts[slot]
            entries = text.held.shape[1]
            looked = KVStatistics([self._random.random((LAYERS, MODEL.num_kv_heads, entries), np.float32)])
            first = len(text.tokens) - count < text.prompt <= len(text.tokens)
            verb = self.policy.after_prefill if first else self.policy.after_step
            before = self.policy.tables([slot])[0]
            edits = verb([slot], looked if "attention_scores" in self.policy.needs else None)
            if edits:
                self._rearrange(slot, edits, before)

    def _rearrange(self, slot: int, edits: Edits, before: np.ndarray) -> None:
        text, after = self.texts[slot], self.policy.tables([slot])[0]
        self._later(replace(edits, moves=(), drops=()))
        self._run()
        held, flat = text.held.copy(), self._flat.copy()
        for move in edits.moves:
            inside = min(move.source, move.target) >= 0 and max(move.source, move.target) < held.shape[1]
            require(move.slot == slot and inside, f"{move} moves what is not there")
            for layer in range(LAYERS) if move.layer is None else [move.layer]:
                source = self._entries(before, np.array([move.source]))
                target = self._entries(after, np.array([move.target]))
                self._flat[layer, target] = flat[layer, source]
                held[layer, move.target] = text.held[layer, move.source]
        for dropped, count in edits.drops:
            require(dropped == slot and 0 <= count <= held.shape[1], f"it drops {count} entries of slot {dropped}")
            held = held[:, : held.shape[1] - count]
        require(self.plan.evicts or not edits.drops, "it drops entries, but its plan does not say evicts")
        text.held = held

    @property
    def _flat(self) -> np.ndarray:
        """The cache as ``[layers, entries]``."""
        return self.cache.reshape(LAYERS, -1)

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
        self._later(placement.edits)
        self._run()
        return placement

    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Take tokens back."""
        self.policy.rewind(slots, counts)
        for slot, n in zip(slots, counts, strict=True):
            text = self.texts[slot]
            del text.tokens[len(text.tokens) - n :], text.names[len(text.names) - n :]
            text.held = text.held[:, : text.held.shape[1] - n]
        self.check()

    def fork(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots onto others."""
        self._later(self.policy.fork(source, target))
        copies = [
            replace(text, tokens=[*text.tokens], names=[*text.names], held=text.held.copy())
            for text in map(self.texts.get, source)
            if text
        ]
        for slot, copy in zip(target, copies, strict=True):
            copy.worst = self.texts[slot].worst if slot in self.texts else 0
            self.texts[slot] = copy
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
        if "integrity" in self._looks:
            self.policy.check_integrity()
        for name in ("contents", "writers", "counts"):
            if name in self._looks:
                getattr(self, f"check_{name}")()

    def check_contents(self) -> None:
        """Every slot reads back its text, as far as a ring keeps it."""
        cache, _ = self._edited()
        for slot, row in self._tables():
            text, length = self.texts[slot], self.policy.length(slot)
            has = text.held.shape[1]
            require(length == has, f"slot {slot} has {has} tokens, length() says {length}")
            kept = self._readable(length)
            found = cache.reshape(LAYERS, -1)[:, self._entries(row, kept)]
            wrong = kept[(found != text.held[:, kept]).any(0)]
            require(not wrong.size, f"slot {slot} does not read back its tokens {wrong.tolist()} of {length}")

    def check_writers(self) -> None:
        """Where a slot may write, nobody else reads or writes."""
        slots = list(self.texts)
        room = self.policy.extend(slots, [0] * len(slots)).room.tolist() if slots else []
        readers = np.zeros(self._flat.shape[1], np.int64)
        for slot, row in self._tables():
            readers[self._entries(row, self._readable(self.texts[slot].held.shape[1]))] += 1
        writers = np.full(self._flat.shape[1], -1)
        for (slot, row), more in zip(self._tables(), room, strict=True):
            length = self.texts[slot].held.shape[1]
            own = np.zeros(self._flat.shape[1], np.int64)
            own[self._entries(row, self._readable(length))] = 1
            entries = self._entries(row, np.arange(length, length + more))
            others = writers[entries][writers[entries] >= 0]
            require(not others.size, f"slots {slot} and {others[:1].tolist()} may both write an entry")
            require(not (readers - own)[entries].any(), f"slot {slot} may write where another slot reads")
            writers[entries] = slot

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

    def _tables(self) -> Iterator[tuple[int, np.ndarray]]:
        slots = list(self.texts)
        return zip(slots, self.policy.tables(slots), strict=True)

    def _readable(self, length: int) -> np.ndarray:
        """Tokens that a cache still holds."""
        window, sink = self.plan.window, self.plan.sink
        if window is None or length <= window:
            return np.arange(length)
        return np.array([*range(sink), *range(length - (window - sink), length)])

    def _entries(self, row: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where tokens are, as indices of the flat cache."""
        index, within = np.divmod(self._places[positions], self.plan.tokens_per_block)
        blocks = row[index].astype(np.int64)
        require(bool((blocks >= 0).all()), f"there is no block for tokens {positions[blocks < 0].tolist()}")
        entries: np.ndarray = blocks * self.plan.tokens_per_block + within
        return entries

    def _later(self, edits: Edits) -> None:
        """Run edits before something is written: as one with those that pend, or these first where that cannot be."""
        if edits.saves or self._pending.loads:
            self._run()
        self._pending += edits

    def _run(self) -> None:
        """Run what pends."""
        (self.cache, self.host), self._pending = self._edited(), Edits()

    def _edited(self) -> tuple[np.ndarray, np.ndarray]:
        """Cache and host after the pending edits: of copies, all sources are read before a destination is written."""
        cache, host = self.cache.copy(), self.host.copy()
        for block, place in self._pending.saves:
            host[:, place] = cache[:, block]
        if self._pending.copies:
            source, target = zip(*self._pending.copies, strict=True)
            require(len(set(target)) == len(target), "two copies have one destination")
            cache[:, list(target)] = self.cache[:, list(source)]
        for place, block in self._pending.loads:
            cache[:, block] = host[:, place]
        return cache, host

    def _spelled(self, extra: tuple[Any, ...], before: Sequence[int], tokens: Iterable[int]) -> list[int]:
        """What tokens after a text, whose last name is the last of ``before``, are called."""
        name = before[-1] if before else self._name(-1, extra)
        names = []
        for token in tokens:
            name = self._name(name, token)
            names.append(name)
        return names

    def _name(self, before: int, what: Any) -> int:
        return self._names.setdefault((before, what), len(self._names))
