"""``PaddedRuns``: packed rows on an engine of the padded, linear contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtllm_core.session import Session


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of one row that run together."""

    cache_row: int
    ids: np.ndarray
    """int32 ``[tokens]``."""
    past: int
    asked: np.ndarray
    """int64 ``[n]``: which of the tokens' logits are wanted."""
    out: np.ndarray
    """int64 ``[n]``: where in the step's logits they go."""


class PaddedRuns:
    """Takes the tensors of the packed, paged contract, so that the loop knows no other, and runs them padded.

    With one block a slot, as the policy ``contiguous`` plans for linear caches, a row's block table is its row of the
    caches. Rows that are neighbours there run together, padded to the longest; a step of several phases, or one whose
    rows are scattered, is several runs. No row is padded beyond its cache, nor beyond what the engine takes in a run.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        limits = {spec.name: spec.maximum for spec in session.engine.tensors}
        self._most_tokens, self._most_asked = limits["input_ids"][1], limits["logit_indices"][1]
        self._capacity = session.config.build.max_seq_len

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run the rows into ``outputs["logits"]``, float32 ``[asked, vocab_size_padded]``."""
        packed = {name: tensor.numpy() for name, tensor in inputs.items()}
        logits = outputs["logits"]
        if (packed["query_lengths"] == 1).all() and self._run_as_they_are(packed, logits):
            return
        left = self._parts(packed)
        while left:
            now = [parts.pop(0) for parts in left]
            left = [parts for parts in left if parts]
            for group in self._groups(now):
                self._run_group(group, logits)

    def _run_as_they_are(self, packed: Mapping[str, Any], logits: torch.Tensor) -> bool:
        """The common step: one token of neighbouring rows, all of them asked for, in order. Nothing is copied."""
        rows, count = packed["block_tables"][:, 0], len(packed["query_lengths"])
        if not (_steady(rows) and logits.shape[0] == count and (packed["logits_indices"] == np.arange(count)).all()):
            return False
        self._launch(
            packed["input_ids"].reshape(count, 1), packed["past_lengths"], np.zeros((count, 1), np.int64), rows, logits
        )
        return True

    def _parts(self, packed: Mapping[str, Any]) -> list[list[_Part]]:
        """Each row's tokens, cut to what a run takes, in the order of the caches' rows."""
        asked = packed["logits_indices"]
        starts = np.cumsum(packed["query_lengths"]) - packed["query_lengths"]
        rows = []
        for start, length, past, table in zip(
            starts.tolist(),
            packed["query_lengths"].tolist(),
            packed["past_lengths"].tolist(),
            packed["block_tables"],
            strict=True,
        ):
            parts = []
            for at in range(0, length, self._most_tokens):
                end = min(at + self._most_tokens, length)
                out = np.flatnonzero((asked >= start + at) & (asked < start + end))
                ids = packed["input_ids"][start + at : start + end]
                parts.append(_Part(int(table[0]), ids, past + at, asked[out] - start - at, out))
            rows.append(parts)
        return sorted(rows, key=lambda parts: parts[0].cache_row)

    def _groups(self, parts: list[_Part]) -> Iterator[list[_Part]]:
        """Neighbours that may be padded to one length."""
        group: list[_Part] = []
        for part in parts:
            if group and not self._may_join(group, part):
                yield group
                group = []
            group.append(part)
        yield group

    def _may_join(self, group: list[_Part], part: _Part) -> bool:
        if part.cache_row != group[-1].cache_row + 1:
            return False
        if (len(part.ids) == 1) != (len(group[0].ids) == 1):  # decoding rows are not padded to a prompt
            return False
        tokens = max(len(one.ids) for one in (*group, part))
        return max(one.past for one in (*group, part)) + tokens <= self._capacity

    def _run_group(self, group: list[_Part], logits: torch.Tensor) -> None:
        tokens, asked = max(len(part.ids) for part in group), max(1, *(len(part.asked) for part in group))
        for first in range(0, asked, self._most_asked):  # an engine may give fewer logits a run than are asked for
            wanted = [part.asked[first : first + self._most_asked] for part in group]
            ids = np.zeros((len(group), tokens), np.int64)
            index = np.zeros((len(group), max(1, *map(len, wanted))), np.int64)
            for row, (part, positions) in enumerate(zip(group, wanted, strict=True)):
                ids[row, : len(part.ids)] = part.ids
                index[row, : len(positions)] = positions
            out = torch.empty(*index.shape, logits.shape[1], device=logits.device)
            past, rows = (np.array([getattr(part, name) for part in group]) for name in ("past", "cache_row"))
            self._launch(ids, past, index, rows, out)
            for row, part in enumerate(group):
                place = part.out[first : first + self._most_asked]
                if len(place):
                    logits[torch.from_numpy(place).to(logits.device)] = out[row, : len(place)]

    def _launch(
        self, ids: np.ndarray, past: np.ndarray, index: np.ndarray, rows: np.ndarray, out: torch.Tensor
    ) -> None:
        arrays = {"input_ids": ids, "write_indices": past, "logit_indices": index, "cache_rows": rows}
        tensors = {name: torch.from_numpy(array.astype(np.int64, copy=False)) for name, array in arrays.items()}
        self._session.run(tensors, {"logits": out.view(*index.shape, out.shape[-1])})


def _steady(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) == 1).all())
