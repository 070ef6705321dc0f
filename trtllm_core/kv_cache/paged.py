"""The paged policy: blocks on demand, shared by forks, copied when written; optionally a ring with sinks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache.blocks import BlockPool, require
from trtllm_core.kv_cache.options import BlockOptions, PagedOptions
from trtllm_core.kv_cache.slots import Counts, Rows, SlotPolicy
from trtllm_core.plugin.kv_policy import (
    Admission,
    Edits,
    KVBudget,
    KVModel,
    KVPlan,
    KVUsage,
    OutOfBlocksError,
    Placement,
)


class PagedPolicy(SlotPolicy):
    """Reference-counted blocks of ``tokens_per_block`` tokens.

    **Admission is worst case.** ``admit`` promises a slot all blocks that its prompt and ``max_new_tokens`` can need.
    A slot that stays within its promise never runs out, whatever is forked onto it (a beam's blocks are at most as
    many as its promise). A slot that was made by ``fork`` has no promise: it grows into what is promised to nobody,
    and ``extend`` raises :class:`OutOfBlocksError` when that is used up. Admit every branch to be safe from it.
    With ``admission="optimistic"`` only the prompt and one token are looked for, and every slot grows while a block is
    free.

    **Sharing.** ``fork`` shares the blocks that hold tokens, never reserved ones, and takes the room of both sides
    away where their last block is now shared. ``extend`` copies what a slot would write and does not own alone.

    **Ring.** With ``max_attention_window`` = W and ``sink_token_length`` = S, token p lives in entry p below W, and in
    ``S + (p - S) % (W - S)`` after that: exactly the first S and the last W - S tokens are kept. Neither needs to be a
    multiple of the block size, so there is no bubble between them. Tokens keep their own numbers as rotary positions.
    Whatever is written in a ring destroys what it overwrites, committed or not: beyond W nothing can be rewound, and
    no more may be written than is going to be committed. A window that no slot can fill is no ring.

    A model all of whose layers have a sliding window gets a ring of that and one block more: so many tokens it can
    take back, and loses nothing that a layer still sees.
    """

    Options: ClassVar[type[BlockOptions]] = PagedOptions

    def __init__(self, options: BlockOptions | None = None) -> None:
        super().__init__(options or self.Options())

    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """See :meth:`KVPolicy.plan`: as many whole blocks as the budget holds."""
        tpb = budget.tokens_per_block
        window, sink, slack = self._window(model, tpb)
        blocks = budget.max_tokens // tpb
        if not blocks:
            raise CapacityError(
                f"a KV cache of {budget.max_tokens} tokens does not hold one block of {tpb}: "
                "raise KVCacheConfig.max_tokens, or build with a smaller tokens_per_block"
            )
        if window is not None and (window >= budget.max_seq_len or window > blocks * tpb):
            window = None
        capacity = window or min(budget.max_seq_len, blocks * tpb)
        per_slot = -(-capacity // tpb)
        if window is not None:
            blocks = min(blocks, budget.max_slots * per_slot)  # more could never be filled
        plan = KVPlan(blocks, tpb, per_slot, model, window, sink if window else 0, rewindable=slack if window else None)
        self._reset(budget, plan.max_blocks_per_slot)
        self._plan, self._capacity = plan, capacity
        self._ring = (window, plan.sink) if window else None
        self._slack = plan.rewindable or 0
        self._longest = budget.max_seq_len if window else capacity
        self._pool = BlockPool(blocks)
        self._index = np.arange(plan.max_blocks_per_slot)
        self._held: Counts = np.zeros(budget.max_slots, dtype=np.int64)
        self._promised: Counts = np.zeros(budget.max_slots, dtype=np.int64)
        self._peak: Counts = np.zeros(budget.max_slots, dtype=np.int64)
        """Most tokens that a slot of a ring has had: what they overwrote is gone, taken back or not."""
        return plan

    def admit(
        self, slot: int, tokens: Sequence[int], max_new_tokens: int, extra_key: tuple[Any, ...] = ()
    ) -> Admission | None:
        """See :meth:`KVPolicy.admit`: None until the worst case fits in what is promised to nobody."""
        need, spared = self._need(slot, len(tokens), max_new_tokens)
        if need > self._unpromised() - spared:
            return None
        self._live[slot], self._promised[slot] = True, need
        return Admission()

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> Placement:
        """See :meth:`KVPolicy.extend`; CapacityError beyond what a slot can hold. Does the copy-on-write."""
        rows, more = self._rows_and_counts(slots, counts)
        want = self._length[rows] + more
        short = np.flatnonzero(want > self._limit[rows])
        edits = self._make_room(rows[short], want[short]) if short.size else Edits()
        return Placement(self._table.take(rows, axis=0), self._limit[rows] - self._length[rows], edits)

    def commit(
        self, slots: Sequence[int], counts: Sequence[int], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """See :meth:`SlotPolicy.commit`."""
        super().commit(slots, counts)
        if self._ring:
            rows = list(slots)
            self._peak[rows] = np.maximum(self._peak[rows], self._length[rows])

    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See :meth:`KVPolicy.rewind`; ConfigError for more tokens than there are, and for those that a ring has lost.

        A last block that is shared stays shared, and is copied when it is written again.
        """
        rows, less = self._rows_and_counts(slots, counts)
        rows, less = rows[less > 0], less[less > 0]
        length = self._length[rows]
        for slot, has, n in zip(rows.tolist(), length.tolist(), less.tolist(), strict=True):
            if n > has:
                raise ConfigError(f"slot {slot} has {has} tokens: {n} cannot be taken back")
            if self._ring and self._peak[slot] > self._ring[0] and has - n < self._peak[slot] - self._slack:
                raise ConfigError(
                    f"slot {slot}: {n} tokens cannot be taken back, because its cache is a ring of {self._ring[0]} "
                    f"entries and token {self._peak[slot] - 1} has overwritten an older one; raise "
                    "max_attention_window, or decode without rewinding"
                )
        self._length[rows] = length - less
        self._truncate(rows, self._length[rows])
        self._limit[rows] = self._limits(rows)

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> Edits:
        """See :meth:`KVPolicy.fork`. Copies nothing and takes no block. A live destination keeps its own promise."""
        source, target = self._fork_rows(src, dst)
        used = self._blocks(np.minimum(self._length[source], self._capacity))
        new = np.where(self._index < used[:, None], self._table[source], np.int32(-1))
        old = self._table[target]
        self._pool.share(new[new >= 0])
        self._pool.drop(old[old >= 0])
        self._table[target], self._held[target], self._length[target] = new, used, self._length[source]
        self._live[target], self._peak[target] = True, self._peak[source]
        both = np.union1d(source, target)
        self._limit[both] = self._limits(both)
        return Edits()

    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """See :meth:`KVPolicy.release`. Nothing is kept: this policy does not reuse prefixes."""
        rows = self._rows(slots)
        self._length[rows] = 0
        self._truncate(rows, self._length[rows])
        self._limit[rows], self._promised[rows], self._live[rows], self._peak[rows] = 0, 0, False, 0

    def usage(self) -> KVUsage:
        """See :meth:`KVPolicy.usage`."""
        return KVUsage(len(self._pool), self._pool.free, int((self._pool.refs > 1).sum()))

    def check_integrity(self) -> None:
        """See :meth:`KVPolicy.check_integrity`."""
        self._pool.check()
        owned = self._table[self._table >= 0]
        counted = np.bincount(owned, minlength=len(self._pool))
        wrong = np.flatnonzero(counted != self._owners())
        require(not wrong.size, f"blocks {wrong.tolist()}: the reference count is not the number of slots with them")
        require(bool(((self._table >= 0) == (self._index < self._held[:, None])).all()), "a table has a gap")
        for slot in range(len(self._live)):
            length, limit, row = int(self._length[slot]), int(self._limit[slot]), self._table[slot]
            blocks = row[row >= 0]
            require(len(np.unique(blocks)) == len(blocks), f"slot {slot} lists a block twice")
            over = not self._live[slot]
            require(not (over and (len(blocks) or length or limit)), f"slot {slot} is over, but holds something")
            require(len(blocks) >= self._blocks(min(length, self._capacity)), f"slot {slot} has tokens without a block")
            require(length <= limit <= self._longest, f"slot {slot}: length {length}, but writable up to {limit}")
            for index in self._touched(length, limit):
                block = int(row[index])
                require(block >= 0, f"slot {slot} may write where it has no block")
                require(self._pool.refs[block] == 1, f"slot {slot} may write block {block}, which others share")

    def _window(self, model: KVModel, tokens_per_block: int) -> tuple[int | None, int, int]:
        """Window and sinks of the ring that is wanted, and how many tokens it can take back."""
        options = self.options
        if options.max_attention_window is None and options.follow_sliding_window and model.sliding_window is not None:
            return model.sliding_window + tokens_per_block, 0, tokens_per_block
        return options.max_attention_window, options.sink_token_length, 0

    def _need(self, slot: int, prompt: int, max_new_tokens: int) -> tuple[int, int]:
        """Blocks that a new request must be promised, and those that must be left over.

        Raises:
            CapacityError: it would not fit into an empty pool, with all tokens that it may generate.
        """
        worst = self._new_slot(slot, prompt, max_new_tokens, self._max_seq_len, "BuildConfig.max_seq_len")
        most = self._capacity if self._ring else worst
        need = self._blocks(min(worst, most))
        spared = math.ceil(self.options.watermark * len(self._pool))
        if need > len(self._pool) - spared:
            tpb = self._tokens_per_block
            raise CapacityError(
                f"{prompt} prompt tokens and max_new_tokens {max_new_tokens} need {need * tpb} tokens of cache, "
                f"but the whole pool has {(len(self._pool) - spared) * tpb}: raise KVCacheConfig.max_tokens"
                f"{' or lower the watermark' if spared else ''}, or ask for fewer tokens"
            )
        if self.options.admission == "optimistic":
            need = min(need, self._blocks(min(prompt + 1, most)))
        return need, spared

    def _owners(self) -> npt.NDArray[np.int32]:
        """int32 ``[num_blocks]``: how many slots hold each block."""
        return self._pool.refs

    def _blocks(self, tokens: Any) -> Any:
        return -(-tokens // self._tokens_per_block)

    def _unpromised(self) -> int:
        """Blocks that are neither promised nor held: what new requests and unpromised slots may still take."""
        promised = self._promised > 0
        taken = int(np.maximum(self._promised, self._held)[promised].sum())
        strangers = self._table[self._live & ~promised]
        if strangers.size:
            # Blocks that nobody with a promise holds, so that no promise covers them.
            taken += len(np.setdiff1d(strangers[strangers >= 0], self._table[promised]))
        return len(self._pool) - taken

    def _touched(self, start: int, end: int) -> Iterable[int]:
        """Places in the table of the blocks in which tokens ``start`` to ``end - 1`` are written, in order."""
        if start == end:
            return ()
        first = self._plan.cache_index(start)
        last = first + end - start
        if self._ring is None or last <= self._ring[0]:
            return range(first // self._tokens_per_block, self._blocks(last))
        window, sink = self._ring
        again = range(sink // self._tokens_per_block, self._blocks(min(sink + last - window, window)))
        return dict.fromkeys([*range(first // self._tokens_per_block, len(self._index)), *again])

    def _make_room(self, rows: Rows, want: Counts) -> Edits:
        """Blocks for each slot up to token ``want``: count them all first, take them afterwards."""
        self._check_want(rows, want, self._longest)
        refs = self._pool.refs
        draws: list[tuple[int, int, int]] = []
        """(slot, place in its table, shared block to copy or -1)"""
        left: dict[int, int] = {}
        """Owners that shared blocks have less, once the draws so far are done: the last one need not copy."""
        strange = 0
        for slot, end in zip(rows.tolist(), want.tolist(), strict=True):
            before, held = len(draws), int(self._held[slot])
            counted, promised = held, int(self._promised[slot])
            for index in self._touched(int(self._length[slot]), end):
                block = int(self._table[slot, index])
                if block < 0:
                    held += 1
                elif refs[block] - left.get(block, 0) == 1:
                    continue
                else:
                    left[block] = left.get(block, 0) + 1
                draws.append((slot, index, block))
            # Of a slot with a promise, shared blocks are counted already as if they were its own.
            strange += max(0, held - max(promised, counted)) if promised else len(draws) - before
        missing = len(draws) - self._pool.available
        if strange and self.options.admission == "worst_case":  # else nobody was promised anything to grow into
            missing = max(missing, strange - self._unpromised())
        if missing > 0:
            raise OutOfBlocksError(missing)
        drawn = [self._draw(*draw) for draw in draws]
        self._limit[rows] = self._limits(rows)
        return Edits(tuple(pair for pair in drawn if pair[0] >= 0))

    def _draw(self, slot: int, index: int, block: int) -> tuple[int, int]:
        """Give a slot a block of its own; returns (block it had there, new block)."""
        # A slot's run starts at its own share of the pool and goes on with neighbours: where the pool is large enough
        # every slot lies in one piece, which attention on the CPU reads without gathering.
        home = slot * len(self._pool) // len(self._live)
        new = self._pool.take(int(self._table[slot, index - 1]) + 1 if index else home)
        if block >= 0:
            self._pool.unshare(block)
        else:
            self._held[slot] = index + 1
        self._table[slot, index] = new
        return block, new

    def _truncate(self, rows: Rows, length: Counts) -> None:
        """Give back the blocks after the first ``length`` tokens."""
        keep = self._blocks(np.minimum(length, self._capacity))
        if (keep == self._held[rows]).all():
            return
        table = self._table[rows]
        extra = (table >= 0) & (self._index >= keep[:, None])
        self._pool.drop(table[extra])
        self._table[rows] = np.where(extra, np.int32(-1), table)
        self._held[rows] = keep

    def _limits(self, rows: Rows) -> Counts:
        """How far slots may be written: up to the first block, in writing order, that is missing or shared."""
        length, tpb = self._length[rows], self._tokens_per_block
        table = self._table[rows]
        stop = (table < 0) | (self._pool.refs[table] != 1)
        entry = length
        if self._ring:
            window, sink = self._ring
            entry = np.where(length < window, length, sink + (length - sink) % (window - sink))
        ahead = stop & (self._index >= (entry // tpb)[:, None])
        limit = length + np.maximum(ahead.argmax(axis=1) * tpb - entry, 0)
        wrapped: Any = self._longest
        if self._ring:
            again = stop & (self._index >= sink // tpb)
            behind = length + (window - entry) + np.maximum(again.argmax(axis=1) * tpb - sink, 0)
            wrapped = np.where(again.any(axis=1), behind, wrapped)
        writable: Counts = np.minimum(np.where(ahead.any(axis=1), limit, wrapped), self._longest)
        return writable
