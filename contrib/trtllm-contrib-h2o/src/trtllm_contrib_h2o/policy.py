"""The policy: in each layer the entries that were looked at most, and the newest (arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from trtllm_core.errors import ConfigError
from trtllm_core.kv_cache import ContiguousPolicy
from trtllm_core.plugin import Admission, Edits, KVBudget, KVModel, KVPlan, KVStatistics, Move


class H2OOptions(BaseModel, extra="forbid"):
    """``KVCacheConfig.options``."""

    heavy: int = Field(default=64, ge=0, description="entries that are kept because they were looked at most")
    recent: int = Field(default=64, ge=1, description="newest entries, which are kept whatever they are")


class H2OPolicy(ContiguousPolicy):
    """After each step a slot is cut to ``heavy + recent`` entries, by layer. Its room is a fixed run, so that entries
    may move in it at will; a text may be longer than that."""

    Options: ClassVar[type[BaseModel]] = H2OOptions
    needs: ClassVar[frozenset[str]] = frozenset({"attention_scores"})

    def __init__(self, options: H2OOptions | None = None) -> None:
        super().__init__(options or H2OOptions())
        self._sums: dict[int, np.ndarray] = {}  # by slot, float32 [layers, entries]
        self._born: dict[int, np.ndarray] = {}  # by slot, int64 [layers, entries]: numbers of tokens
        self._most = 0

    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """See ``KVPolicy.plan``; ConfigError where the entries to keep do not fit a slot."""
        plan = super().plan(model, budget)
        self._sums, self._born = {}, {}
        self._most = min(plan.max_blocks_per_slot * plan.tokens_per_block, budget.max_seq_len)
        keep = self.options.heavy + self.options.recent
        if keep >= self._most:
            raise ConfigError(f"h2o keeps {keep} entries, but a slot has {self._most}: lower heavy or recent")
        return replace(plan, evicts=True, rewindable=0)

    def admit(
        self, slot: int, tokens: Sequence[int], max_new_tokens: int, extra_key: tuple[Any, ...] = ()
    ) -> Admission | None:
        """See ``KVPolicy.admit``: only the prompt must fit."""
        return super().admit(slot, tokens, min(max_new_tokens, max(self._most - len(tokens), 0)), extra_key)

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> Edits:
        """See ``KVPolicy.fork``."""
        edits = super().fork(src, dst)
        for state in (self._sums, self._born):
            copies = [
                (target, state[source].copy()) for source, target in zip(src, dst, strict=True) if source in state
            ]
            state.update(copies)
        return edits

    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """See ``KVPolicy.release``."""
        super().release(slots, keep)
        for slot in slots:
            self._sums.pop(slot, None)
            self._born.pop(slot, None)

    def after_prefill(self, slots: Sequence[int], statistics: KVStatistics | None = None) -> Edits | None:
        """See ``KVPolicy.after_prefill``."""
        return self.after_step(slots, statistics)

    def after_step(self, slots: Sequence[int], statistics: KVStatistics | None = None) -> Edits | None:
        """See ``KVPolicy.after_step``."""
        assert statistics is not None
        moves: list[Move] = []
        drops: list[tuple[int, int]] = []
        for slot, looked in zip(slots, statistics.attention, strict=True):
            self._count(slot, looked.sum(1))
            over = looked.shape[2] - self.options.heavy - self.options.recent
            if over > 0:
                moves += self._cut(slot, looked.shape[2] - over)
                drops.append((slot, over))
                self.rewind([slot], [over])
        return Edits(moves=tuple(moves), drops=tuple(drops)) if drops else None

    def _count(self, slot: int, looked: np.ndarray) -> None:
        """Add a step's ``looked [layers, entries]``; entries at the end are new."""
        layers, entries = looked.shape
        sums = self._sums.get(slot, np.zeros((layers, 0), np.float32))
        born = self._born.get(slot, np.zeros((layers, 0), np.int64))
        new = entries - sums.shape[1]
        first = int(born.max(initial=-1)) + 1
        self._sums[slot] = np.pad(sums, ((0, 0), (0, new))) + looked
        self._born[slot] = np.hstack((born, np.tile(np.arange(first, first + new), (layers, 1))))

    def _cut(self, slot: int, left: int) -> list[Move]:
        """Keep ``left`` entries of each layer: those that would be behind them go where a victim was."""
        sums, born, moves = self._sums[slot], self._born[slot], []
        for layer in range(len(sums)):
            order = np.argsort(born[layer])
            newest, others = order[-self.options.recent :], order[: -self.options.recent]
            heavy = others[np.argsort(-sums[layer, others], kind="stable")[: self.options.heavy]]
            kept = np.zeros(sums.shape[1], np.bool_)
            kept[newest] = kept[heavy] = True
            source, target = np.flatnonzero(kept[left:]) + left, np.flatnonzero(~kept[:left])
            sums[layer, target], born[layer, target] = sums[layer, source], born[layer, source]
            moves += [Move(slot, int(a), int(b), layer) for a, b in zip(source, target, strict=True)]
        self._sums[slot], self._born[slot] = sums[:, :left], born[:, :left]
        return moves
