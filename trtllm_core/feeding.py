"""``Feed``: what the engine reads in a step, written into buffers that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.kv_cache.cache import KVCache


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step runs, packed: ``counts[i]`` next tokens of slot ``slots[i]``, one row after another."""

    slots: np.ndarray
    """int64 ``[rows]``."""
    counts: np.ndarray
    """int64 ``[rows]``."""
    asking: np.ndarray
    """bool ``[rows]``: rows whose last known token is among them, so that a next one can be chosen."""
    drafts: np.ndarray | None = None
    """int64 ``[asking]``: how many of the tokens are drafts, behind the last known one; None: none."""
    steady: bool = False
    """Every row runs one token and asks for the next one: what nearly all steps do."""


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Logits of a step that requests want of their prompts."""

    place: np.ndarray
    """int64 ``[n]``: where they are among all that the step gives."""
    owner: np.ndarray
    """int64 ``[n]``: whose they are, by slot."""
    position: np.ndarray
    """int64 ``[n]``: of the token that they follow."""


@dataclass(frozen=True, slots=True)
class Newest:
    """Tokens of a step that has not landed: the device has them, the host does not."""

    slots: Sequence[int]
    tokens: torch.Tensor
    """int32 ``[n]``, on the device."""


@dataclass(frozen=True, slots=True)
class Fed:
    """The engine's inputs of a step. They are views of the feed's buffers, and good until the next step is fed."""

    inputs: dict[str, torch.Tensor]
    """By name, on the CPU; ``input_ids`` on the device where it has some that the host has not seen yet."""
    given: int
    """How many positions' logits the engine gives."""
    prompts: PromptLogits | None = None
    """None: nobody wants any, and the logits are those that tokens are chosen from, in order."""
    chosen_from: np.ndarray | None = None
    """With ``prompts``, int64: where among the logits those are that tokens are chosen from."""


class Feed:
    """Packs rows for the engine.

    Args:
        rows: most rows of a step.
        tokens: that a step may run; more make the buffers grow.
        cache: where they are cached.
        branches: whose text they are.
    """

    def __init__(self, rows: int, tokens: int, cache: KVCache, branches: BranchTable) -> None:
        self._cache = cache
        self._branches = branches
        self._index = np.arange(rows)
        self._ones = torch.ones(rows, dtype=torch.int32)
        self._lengths = np.zeros(rows, np.int32)
        self._past = np.zeros(rows, np.int32)
        self._tables = np.full((rows, cache.tables.shape[1]), -1, np.int32)
        self._place = np.zeros(rows, np.int64)  # by slot: its row in the step before
        self._steady: dict[int, dict[str, torch.Tensor]] = {}  # inputs of a steady step, by its number of rows
        self._reserve(max(tokens, rows))

    def fill(self, rows: Rows, newest: Newest | None = None) -> Fed:
        """Write what the engine reads to run ``rows``; ``newest`` are tokens that the host has not seen yet."""
        fed = self._fill(rows)
        ahead = self._branches.slots.ahead[rows.slots] > 0 if newest is not None else None
        if newest is None or ahead is None or not ahead.any():
            return fed
        ids = self._with_newest(rows, fed.inputs["input_ids"], ahead, newest)
        return replace(fed, inputs=fed.inputs | {"input_ids": ids})

    def _with_newest(self, rows: Rows, ids: torch.Tensor, ahead: np.ndarray, newest: Newest) -> torch.Tensor:
        """The tokens of a step on the device: those that are known here, and those that only the device knows.

        ``ahead``, bool ``[rows]``, says which rows run one of these, and nothing else.
        """
        if ahead.all() and newest.slots == rows.slots.tolist():  # nearly always
            return newest.tokens
        self._place[newest.slots] = np.arange(len(newest.slots))
        device = newest.tokens.device
        chosen = newest.tokens[torch.from_numpy(self._place[rows.slots[ahead]]).to(device, non_blocking=True)]
        if ahead.all():
            return chosen
        at = torch.from_numpy(np.cumsum(rows.counts)[ahead] - 1).to(device, non_blocking=True)
        return ids.to(device, non_blocking=True).index_put_((at,), chosen)

    def _fill(self, rows: Rows) -> Fed:
        count = len(rows.slots)
        cache = self._cache
        past = cache.cached[rows.slots]
        np.take(cache.tables, rows.slots, axis=0, out=self._tables[:count], mode="clip")
        np.subtract(past, cache.dropped[rows.slots], out=self._past[:count], casting="unsafe")
        if rows.steady and not self._branches.gathering.wants_prompts:
            return self._fill_steady(rows.slots, past)
        return self._fill_any(rows, past)

    def _fill_steady(self, slots: np.ndarray, past: np.ndarray) -> Fed:
        count = len(slots)
        ids = self._ids[:count]
        ids[:] = self._branches.slots.tokens[slots, past]
        self._position[:count] = past
        inputs = self._steady.get(count)
        if inputs is None:
            inputs = self._steady[count] = self._views(count, count) | {
                "query_lengths": self._ones[:count],
                "logits_indices": torch.from_numpy(self._index[:count]),
            }
        further = self._branches.conditions.inputs(slots, self._index[:count], ids)
        return Fed(inputs | further if further else inputs, count)

    def _fill_any(self, rows: Rows, past: np.ndarray) -> Fed:
        """Prompts, chunks of them, drafts, and rows that decode, as they come."""
        ends = np.cumsum(rows.counts)
        total, count = int(ends[-1]), len(rows.slots)
        if total > len(self._ids):
            self._reserve(total)
        row = np.repeat(self._index[:count], rows.counts)
        position, ids = self._position[:total], self._ids[:total]
        np.subtract(np.arange(total), (ends - rows.counts - past)[row], out=position)
        owner = rows.slots[row]
        ids[:] = self._branches.slots.tokens[owner, position]
        further = self._branches.conditions.inputs(rows.slots, row, ids)
        asked = ends[rows.asking] - 1
        if rows.drafts is not None:
            asked = np.concatenate([np.arange(e - d, e + 1) for e, d in zip(asked, rows.drafts, strict=True)])
        kept = self._branches.gathering.asked(owner, position)
        given = asked if kept is None else np.union1d(asked, kept)
        self._lengths[:count] = rows.counts
        inputs = self._views(count, total) | {
            "query_lengths": torch.from_numpy(self._lengths[:count]),
            "logits_indices": torch.from_numpy(given),
        }
        if kept is None:
            return Fed(inputs | further, len(given))
        prompts = PromptLogits(np.searchsorted(given, kept), owner[kept], position[kept])
        return Fed(inputs | further, len(given), prompts, np.searchsorted(given, asked))

    def _views(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        arrays = {
            "input_ids": self._ids[:tokens],
            "position_ids": self._position[:tokens],
            "past_lengths": self._past[:rows],
            "block_tables": self._tables[:rows],
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _reserve(self, tokens: int) -> None:
        self._ids = np.zeros(tokens, np.int32)
        self._position = np.zeros(tokens, np.int64)
        self._steady.clear()
