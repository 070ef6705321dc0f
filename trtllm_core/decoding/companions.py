"""Companions at work: branches that run beside others, commit the same tokens, and are nobody's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trtllm_core.decoding.companion_prompts import CompanionPrompts
from trtllm_core.plugin import LogitsBatch


@dataclass(frozen=True, slots=True)
class CompanionLogits:
    """What the companions of a step were given by the engine, and which of a step's positions they stand beside."""

    logits: torch.Tensor
    """float32 ``[m, vocab_size_padded]``, raw."""
    tables: Mapping[object, torch.Tensor]
    """By the processor's key: int64 ``[n, c]``, for each position the rows of its companions; -1: it has none there."""

    def seen_by(self, key: object, batch: LogitsBatch) -> LogitsBatch:
        """The batch as a processor is shown it: with its own companions, and nobody else's."""
        table = self.tables.get(key)
        return batch if table is None else replace(batch, companion_logits=self.logits, companions=table)


@dataclass(frozen=True, slots=True)
class Beside:
    """The companions' part of a step."""

    logits: torch.Tensor
    """float32 ``[m, vocab_size_padded]``, raw."""
    rows: dict[int, int]
    """By the slot of a companion: its row of ``logits``."""


class Companions:
    """Which slots hold companions, and whose. Nobody asks it anything while it is empty."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.of: dict[int, tuple[int, ...]] = {}
        """By the slot of a branch: the slots of its companions."""
        self.here = np.zeros(slots, np.bool_)
        """bool ``[slots]``: whether a companion is in it."""
        self._by_plugin: dict[int, dict[object, tuple[int, ...]]] = {}
        self._device = device

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.of)

    def begin(self, branches: Sequence[int], companions: tuple[int, ...], asked: Sequence[CompanionPrompts]) -> None:
        """Slots of a request: branch by branch, each has those of its ``companions`` that run the prompts ``asked``."""
        each = len(companions) // len(branches)
        for number, slot in enumerate(branches if asked else ()):
            self.of[slot] = companions[number * each : (number + 1) * each]
            left = iter(self.of[slot])
            self._by_plugin[slot] = {one.key: tuple(next(left) for _ in one.prompts) for one in asked}
        self.here[list(companions)] = True

    def end(self, slot: int) -> None:
        """The slot is free, whatever it held."""
        self.here[slot] = False
        self.of.pop(slot, None)
        self._by_plugin.pop(slot, None)

    def with_pairs(self, src: Sequence[int], dst: Sequence[int]) -> tuple[list[int], list[int]]:
        """Branches ``dst`` become copies of ``src``: the same, with their companions."""
        pairs: list[tuple[int, int]] = []
        for a, b in zip(src, dst, strict=True):
            pairs += zip(self.of.get(a, ()), self.of.get(b, ()), strict=True)
        return [*src, *(a for a, _ in pairs)], [*dst, *(b for _, b in pairs)]

    def of_rows(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """The companions of some branches, and for each the place of its branch in ``slots``."""
        found = [(companion, row) for row, slot in enumerate(slots) for companion in self.of.get(slot, ())]
        return [companion for companion, _ in found], [row for _, row in found]

    def share(self, running: Sequence[int], wanted: np.ndarray, budget: int) -> tuple[list[int], list[int]]:
        """Who runs how many tokens in a step: the next token of all that generate, then prompts, in order.

        A branch and its companions end their texts together, so that their logits are there in one step: the last
        tokens wait until all of them fit.

        Args:
            running: the slots of branches, in order.
            wanted: int64 ``[slots]``: how many tokens of each slot are not in the cache yet.
            budget: tokens that a step may run: not less than there are slots.
        """
        groups = [(slot, *self.of.get(slot, ())) for slot in running]
        needs = [wanted[list(group)].tolist() for group in groups]
        slots: list[int] = []
        for i in (i for i, need in enumerate(needs) if max(need) == 1):
            slots += (slot for slot, need in zip(groups[i], needs[i], strict=True) if need)
        slots.sort()  # neighbours may be neighbours in a linear cache
        counts = [1] * len(slots)
        left = budget - len(slots)
        for i in (i for i, need in enumerate(needs) if max(need) > 1):
            back = 1 if len(groups[i]) > 1 and sum(needs[i]) > left else 0
            for slot, need in zip(groups[i], needs[i], strict=True):
                count = min(need - back, left)
                if count > 0:
                    slots.append(slot)
                    counts.append(count)
                    left -= count
        return slots, counts

    def parted(
        self, slots: Sequence[int], logits: torch.Tensor, drafts: np.ndarray | None
    ) -> tuple[list[int], torch.Tensor, np.ndarray | None, Beside]:
        """Take the companions out of a step's asking rows.

        Args:
            slots: of the rows.
            logits: float32 ``[n, vocab_size_padded]``, by position.
            drafts: int64, how many drafts each row has; None: none. Companions have none.

        Returns:
            The same three without companions, and the companions.
        """
        beside = self.here[list(slots)]
        position = beside if drafts is None else np.repeat(beside, drafts + 1)
        own, others = (
            torch.from_numpy(np.flatnonzero(flag)).to(self._device, non_blocking=True) for flag in (~position, position)
        )
        companions = [slot for slot, flag in zip(slots, beside, strict=True) if flag]
        mine = [slot for slot, flag in zip(slots, beside, strict=True) if not flag]
        rows = {slot: row for row, slot in enumerate(companions)}
        assert rows.keys() >= set(self.of_rows(mine)[0]), "a branch asks for a token in a step without its companions"
        return mine, logits[own], None if drafts is None else drafts[~beside], Beside(logits[others], rows)

    def shown(self, slots: Sequence[int], beside: Beside) -> CompanionLogits:
        """What processors are shown: ``slots`` by position, ``beside`` as ``parted`` gives it."""
        tables = {}
        for key in {key: None for slot in slots for key in self._by_plugin.get(slot, ())}:
            of = [self._by_plugin.get(slot, {}).get(key, ()) for slot in slots]
            width = max(map(len, of))
            table = [[*(beside.rows[slot] for slot in mine), *([-1] * (width - len(mine)))] for mine in of]
            tables[key] = torch.tensor(table).to(self._device, non_blocking=True)
        return CompanionLogits(beside.logits, tables)
