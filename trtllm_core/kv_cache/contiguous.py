"""The contiguous policy: every slot owns a fixed run of entries. Nothing is shared, so forks copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache.blocks import require
from trtllm_core.kv_cache.slots import SlotPolicy
from trtllm_core.plugin.kv_policy import Admission, Edits, KVBudget, KVModel, KVPlan, KVUsage, Placement


class ContiguousPolicy(SlotPolicy):
    """Slot i owns blocks ``i * k`` to ``i * k + k - 1``, for as long as the session lives.

    ``k`` blocks hold ``max_seq_len`` tokens, or the slot's even share of a smaller budget. With ``tokens_per_block`` =
    ``max_seq_len`` a slot is one block, a row of a linear cache. A fork copies the blocks that hold tokens.
    """

    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """See :meth:`KVPolicy.plan`."""
        tpb = budget.tokens_per_block
        run = min(-(-budget.max_seq_len // tpb), budget.max_tokens // (tpb * budget.max_slots))
        if not run:
            raise CapacityError(
                f"a KV cache of {budget.max_tokens} tokens does not hold one block of {tpb} for each of "
                f"{budget.max_slots} slots: raise KVCacheConfig.max_tokens, or use the 'paged' policy"
            )
        self._reset(budget, run)
        self._capacity = min(run * tpb, budget.max_seq_len)
        self._runs = np.arange(budget.max_slots * run, dtype=np.int32).reshape(budget.max_slots, run)
        return KVPlan(budget.max_slots * run, tpb, run, model)

    def admit(
        self, slot: int, tokens: Sequence[int], max_new_tokens: int, extra_key: tuple[Any, ...] = ()
    ) -> Admission | None:
        """See :meth:`KVPolicy.admit`: never None, a slot's room is its own."""
        enough = self._capacity == self._max_seq_len
        limit = "BuildConfig.max_seq_len" if enough else "KVCacheConfig.max_tokens, which the slots share evenly"
        self._new_slot(slot, len(tokens), max_new_tokens, self._capacity, limit)
        self._start([slot], [0])
        return Admission()

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> Placement:
        """See :meth:`KVPolicy.extend`: all room is there from the start; CapacityError beyond it."""
        rows, more = self._rows_and_counts(slots, counts)
        length = self._length[rows]
        self._check_want(rows, length + more, self._capacity)
        return Placement(self._table.take(rows, axis=0), self._limit[rows] - length)

    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See :meth:`KVPolicy.rewind`; ConfigError for more tokens than there are. No block is given back."""
        rows, less = self._rows_and_counts(slots, counts)
        over = less > self._length[rows]
        if over.any():
            at = int(over.argmax())
            raise ConfigError(f"slot {rows[at]} has {self._length[rows[at]]} tokens: {less[at]} cannot be taken back")
        self._length[rows] -= less

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> Edits:
        """See :meth:`KVPolicy.fork`: copies, in which a block may be both source and destination (0←1, 1←0)."""
        source, target = self._fork_rows(src, dst)
        length = self._length[source]
        used = np.arange(self._runs.shape[1]) < -(-length // self._tokens_per_block)[:, None]
        copies = zip(self._runs[source][used].tolist(), self._runs[target][used].tolist(), strict=True)
        self._start(target.tolist(), length.tolist())
        return Edits(tuple(copies))

    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """See :meth:`KVPolicy.release`. Nothing is kept."""
        rows = self._rows(slots)
        self._live[rows], self._length[rows], self._limit[rows], self._table[rows] = False, 0, 0, -1

    def usage(self) -> KVUsage:
        """See :meth:`KVPolicy.usage`: the blocks of a live slot are in use, full or not."""
        return KVUsage(self._runs.size, int((~self._live).sum()) * self._runs.shape[1])

    def check_integrity(self) -> None:
        """See :meth:`KVPolicy.check_integrity`."""
        live = self._live
        require(bool((self._table == np.where(live[:, None], self._runs, -1)).all()), "a table is not its slot's run")
        require(bool((self._limit == np.where(live, self._capacity, 0)).all()), "a slot's room is not its own run")
        require(bool(((self._length >= 0) & (self._length <= self._limit)).all()), "a slot has tokens outside its run")

    def _start(self, slots: list[int], lengths: list[int]) -> None:
        self._live[slots], self._limit[slots], self._length[slots] = True, self._capacity, lengths
        self._table[slots] = self._runs[slots]
