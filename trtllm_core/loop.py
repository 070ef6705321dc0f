"""``StepLoop``: one engine execution, and the choice of tokens after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.request import Branch, Delta, Request
from trtllm_core.decoding.stopping import Verdict
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import Plugins, Selection
from trtllm_core.plugin.observer import StepStats
from trtllm_core.session import Session


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step runs, packed: ``counts[i]`` next tokens of slot ``slots[i]``, one row after another."""

    slots: np.ndarray
    """int64 ``[rows]``."""
    counts: np.ndarray
    """int64 ``[rows]``."""
    asking: np.ndarray
    """bool ``[rows]``: rows whose last known token is among them, so that a next one can be chosen."""


class StepLoop:
    """Runs steps. Who runs in one, and when a request may start, is the caller's to say.

    The road of a step: make room → run the engine → process the logits → choose → check for ends → commit → tell.
    ``check`` changes nothing; state moves in ``commit`` alone.
    """

    def __init__(self, session: Session, cache: KVCache, branches: BranchTable, plugins: Plugins) -> None:
        config = session.config
        self.session = session
        self.cache = cache
        self.branches = branches
        self.plugins = plugins
        self.steps = 0
        self._vocab_size = config.model.vocab_size
        self._logits = torch.zeros(config.build.max_batch_size, config.vocab_size_padded, device=session.device)
        self._offsets = torch.zeros(config.build.max_batch_size, dtype=torch.int64, device=session.device)

    @torch.inference_mode()
    def admit(self, request: Request) -> Branch | None:
        """Give a request a slot, its plugins their state and its prompt its room; None: not now, none is free.

        Raises:
            CapacityError: it could not run even alone.
            ConfigError, PluginError: its plan cannot be made, or a plugin refuses what it asks for.
        """
        return self.branches.admit(request, self.cache)

    @torch.inference_mode()
    def step(self, slots: Sequence[int], counts: Sequence[int]) -> list[Delta]:
        """Run ``counts[i]`` tokens of each slot, and choose a next one where the last known token was among them."""
        started = time.perf_counter()
        rows = self._rows(slots, counts)
        generation = self._generation_tokens(rows) if self.plugins.observes_steps else 0
        self.cache.extend(rows.slots, rows.counts)
        logits = self._run(rows)
        self.cache.commit(rows.slots, rows.counts)
        asking = rows.slots[rows.asking]
        deltas = []
        if len(asking):
            slot = torch.from_numpy(asking).to(self.session.device, non_blocking=True)
            self.branches.pipeline.prepare(asking.tolist())
            scores = self.branches.pipeline.apply(logits, slot, self._offsets[: len(asking)])
            # A sampler may overwrite what it is given; who looks at the scores afterwards must find them as they were.
            looks = self.branches.wants_log_probs or self.branches.rules.wants_logits
            given = scores.clone() if looks else scores
            selection = self.branches.choosers.select(given, slot, self._offsets[: len(asking)])
            verdict = self.branches.rules.check(selection, slot, asking.tolist(), scores)
            deltas = self._commit(asking, slot, scores, selection, verdict)
        self._observe(rows, generation, started)
        return deltas

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """A branch is over: its slot and its blocks are free at once. What ended well is left for others to reuse."""
        keep = self.branches.live[slot].finish_reason not in ("plugin_error", "cancelled")
        over = np.array([max(self.cache.cached[slot] - self.branches.slots.lengths[slot], 0)])
        if keep and over.any():  # drafts behind a stop: what is kept must be the text
            self.cache.rewind(np.array([slot]), over)
        self.branches.release(slot)
        self.cache.release(np.array([slot]), keep)

    def _rows(self, slots: Sequence[int], counts: Sequence[int]) -> Rows:
        slot, count = np.asarray(slots, np.int64), np.asarray(counts, np.int64)
        left = self.branches.slots.lengths[slot] - self.cache.cached[slot] - count
        assert (left >= 0).all(), "a step cannot run tokens that are not there"
        return Rows(slot, count, left == 0)

    def _run(self, rows: Rows) -> torch.Tensor:
        """Logits of the asking rows, float32 ``[n, vocab_size_padded]``."""
        past = self.cache.cached[rows.slots]
        ends = np.cumsum(rows.counts)
        row = np.repeat(np.arange(len(rows.slots)), rows.counts)
        position = np.arange(len(row)) - (ends - rows.counts - past)[row]
        inputs = {
            "input_ids": self.branches.slots.tokens[rows.slots[row], position],
            "position_ids": position,
            "query_lengths": rows.counts.astype(np.int32),
            "past_lengths": past.astype(np.int32),
            "block_tables": self.cache.tables[rows.slots],
            "logits_indices": ends[rows.asking] - 1,
        }
        logits = self._logits[: int(rows.asking.sum())]
        self.session.run({name: torch.from_numpy(array) for name, array in inputs.items()}, {"logits": logits})
        if self._vocab_size < logits.shape[1]:
            logits[:, self._vocab_size :] = torch.finfo(torch.float32).min
        return logits

    def _commit(
        self, slots: np.ndarray, slot: torch.Tensor, scores: torch.Tensor, selection: Selection, verdict: Verdict
    ) -> list[Delta]:
        """The chosen tokens, cut where a row ends, become history everywhere; what ended is released."""
        deltas = self.branches.commit(slots, slot, scores, selection, verdict)
        for branch in self.branches.take_finished():
            self.release(branch.slot)
        return deltas

    def _generation_tokens(self, rows: Rows) -> int:
        """Tokens of rows whose whole prompt is in the cache before the step."""
        past = self.cache.cached[rows.slots]
        prompts = np.array([len(self.branches.live[slot].request.prompt) for slot in rows.slots.tolist()])
        return int(rows.counts[past >= prompts].sum())

    def _observe(self, rows: Rows, generation: int, started: float) -> None:
        self.steps += 1
        if not self.plugins.observes_steps:
            return
        self.plugins.on_step_end(
            StepStats(
                step=self.steps,
                rows=len(rows.slots),
                context_tokens=int(rows.counts.sum()) - generation,
                generation_tokens=generation,
                kv_blocks_free=self.cache.usage().free,
                seconds=time.perf_counter() - started,
            )
        )
