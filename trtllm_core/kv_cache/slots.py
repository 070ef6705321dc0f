"""What the built-in policies share: which slots live, how long they are, and how far each may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin.kv_policy import KVBudget, KVPolicy

Rows = npt.NDArray[np.intp]
Counts = npt.NDArray[np.int64]


class SlotPolicy(KVPolicy):
    """Arrays by slot, and the verbs that only need those. A slot lives from ``admit`` or ``fork`` to ``release``."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._reset(KVBudget(0, 0, 1, 0), 0)

    def _reset(self, budget: KVBudget, max_blocks_per_slot: int) -> None:
        self._tokens_per_block = budget.tokens_per_block
        self._max_seq_len = budget.max_seq_len
        self._live = np.zeros(budget.max_slots, dtype=np.bool_)
        self._length: Counts = np.zeros(budget.max_slots, dtype=np.int64)
        self._limit: Counts = np.zeros(budget.max_slots, dtype=np.int64)
        """Token number before which a slot may be written: its room ends there."""
        self._table: npt.NDArray[np.int32] = np.full((budget.max_slots, max_blocks_per_slot), -1, dtype=np.int32)

    def commit(
        self, slots: Sequence[int], counts: Sequence[int], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """See :meth:`KVPolicy.commit`; ConfigError for tokens that lie outside the room."""
        rows, more = self._rows_and_counts(slots, counts)
        length = self._length[rows] + more
        over = length > self._limit[rows]
        if over.any():
            at = int(over.argmax())
            room = int(self._limit[rows[at]] - self._length[rows[at]])
            raise ConfigError(
                f"slot {rows[at]}: {more[at]} tokens were committed, but there is room for {room}: extend first"
            )
        self._length[rows] = length

    def length(self, slot: int) -> int:
        """Committed tokens of a slot; 0 for one that does not live."""
        return int(self._length[self._slot(slot)])

    def tables(self, slots: Sequence[int]) -> npt.NDArray[np.int32]:
        """int32 ``[n, max_blocks_per_slot]``, -1 where there is no block: a copy that stays as it is."""
        return self._table.take(self._rows(slots), axis=0)

    def _slot(self, slot: int) -> int:
        if not 0 <= slot < len(self._live):
            raise ConfigError(f"there is no slot {slot}: the pool was planned for {len(self._live)}")
        return slot

    def _rows(self, slots: Sequence[int]) -> Rows:
        """The slots as an array, all of them live and none named twice."""
        rows = np.asarray(slots, dtype=np.intp)
        if rows.size and rows.min() < 0:
            self._slot(int(rows.min()))
        seen = np.bincount(rows, minlength=len(self._live))
        if len(seen) > len(self._live):
            self._slot(len(seen) - 1)
        wrong = seen > self._live
        if wrong.any():
            slot = int(wrong.argmax())
            raise ConfigError(
                f"slot {slot} is named twice" if self._live[slot] else f"slot {slot} is not in use: admit it first"
            )
        return rows

    def _rows_and_counts(self, slots: Sequence[int], counts: Sequence[int]) -> tuple[Rows, Counts]:
        rows, numbers = self._rows(slots), np.asarray(counts, dtype=np.int64)
        if rows.shape != numbers.shape or (numbers < 0).any():
            raise ConfigError(f"{len(slots)} slots need as many counts >= 0, got {list(counts)}")
        return rows, numbers

    def _fork_rows(self, src: Sequence[int], dst: Sequence[int]) -> tuple[Rows, Rows]:
        """Sources (live) and destinations (each once) of a fork, without the pairs that change nothing."""
        source, target = np.asarray(src, dtype=np.intp), np.asarray(dst, dtype=np.intp)
        if source.shape != target.shape or len(np.unique(target)) != len(target):
            raise ConfigError(
                f"a fork needs as many sources as destinations, each destination once; got {list(src)} to {list(dst)}"
            )
        self._rows(np.unique(source))  # type: ignore[arg-type]
        for slot in target.tolist():
            self._slot(slot)
        changed = source != target
        return source[changed], target[changed]

    def _new_slot(self, slot: int, prompt: int, max_new_tokens: int, capacity: int, limit: str) -> int:
        """Tokens that a new request in a slot may need at most.

        Raises:
            CapacityError: more than ``capacity``, which the setting named ``limit`` says.
        """
        if self._live[self._slot(slot)]:
            raise ConfigError(f"slot {slot} is in use: release it before it is admitted again")
        if max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        if prompt + max_new_tokens > capacity:
            raise CapacityError(
                f"{prompt} prompt tokens and max_new_tokens {max_new_tokens} make {prompt + max_new_tokens}, "
                f"but a sequence can hold {capacity}: raise {limit}, or ask for fewer tokens"
            )
        return prompt + max_new_tokens

    def _check_want(self, rows: Rows, want: Counts, capacity: int) -> None:
        over = want > capacity
        if over.any():
            at = int(over.argmax())
            raise CapacityError(f"slot {rows[at]} would hold {want[at]} tokens, but a sequence can hold {capacity}")
