"""Running tokens that are no text, or not yet, for their final hidden states: in slots of a request that rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trtllm_core.decoding.conditions import Conditions
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.session import Session


class Looks:
    """See ``DecoderHost.look``. What runs stays in the resting slots' cache until they are used again."""

    def __init__(self, session: Session, cache: KVCache, conditions: Conditions) -> None:
        self._session = session
        self._cache = cache
        self._conditions = conditions
        self._most = session.config.build.max_num_tokens

    def run(
        self, source: Sequence[int | None], resting: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """See ``DecoderHost.look``."""
        self._begin(source, np.asarray(resting, np.int64))
        done = [0] * len(resting)
        parts: list[list[torch.Tensor]] = [[] for _ in resting]
        while True:
            rows, ids, left = [], [], self._most
            for row, wanted in enumerate(tokens):
                count = min(len(wanted) - done[row], left)
                if count > 0:
                    rows.append(row)
                    ids.append(np.asarray(wanted[done[row] : done[row] + count], np.int32))
                    done[row] += count
                    left -= count
            if not rows:
                return torch.cat([part for row in parts for part in row])
            states = self._run(np.array([resting[row] for row in rows]), ids)
            start = 0
            for row, each in zip(rows, ids, strict=True):
                parts[row].append(states[start : start + len(each)])
                start += len(each)

    def _begin(self, source: Sequence[int | None], resting: np.ndarray) -> None:
        """The resting slots hold what their tokens come behind, and nothing else."""
        cache = self._cache
        empty = np.array([each is None for each in source])
        used = resting[empty & (cache.cached[resting] > 0)]
        if len(used):
            cache.rewind(used, cache.cached[used])
        if not empty.all():
            cache.fork(np.array([each for each in source if each is not None], np.int64), resting[~empty])

    def _run(self, slots: np.ndarray, ids: Sequence[np.ndarray]) -> torch.Tensor:
        """One call of the engine: float32 ``[tokens, hidden_size]``."""
        cache, config = self._cache, self._session.config
        counts = np.array([len(each) for each in ids])
        cache.extend(slots, counts)
        past, ends, packed = cache.cached[slots], np.cumsum(counts), np.concatenate(ids)
        row = np.repeat(np.arange(len(slots)), counts)
        further = self._conditions.inputs(slots, row, packed)
        arrays = {
            "input_ids": packed,
            "position_ids": np.arange(ends[-1]) - (ends - counts - past)[row],
            "query_lengths": counts.astype(np.int32),
            "past_lengths": (past - cache.dropped[slots]).astype(np.int32),
            "block_tables": cache.tables[slots],
            "logits_indices": np.zeros(0, np.int64),
            "hidden_indices": np.arange(ends[-1]),
        }
        device = self._session.device
        states = torch.empty(int(ends[-1]), config.model.hidden_size, device=device)
        outputs = {"logits": torch.empty(0, config.vocab_size_padded, device=device), "hidden_states": states}
        self._session.run({name: torch.from_numpy(array) for name, array in arrays.items()} | further, outputs)
        cache.commit(slots, counts)
        return states
