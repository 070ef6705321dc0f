"""``Tails``: what follows the engine in a step that looks ahead, captured as CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.committing import take_failures
from trtllm_core.decoding.positions import Positions
from trtllm_core.decoding.tail import Chosen, choose, commit_ahead

PATIENCE = 3
"""Steps in a row that must be alike before their tail is captured, which takes longer than to run it."""

MOST = 64
"""Graphs that are kept, the last ones used."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    chosen: Chosen
    tokens: torch.Tensor


class Tails:
    """Captures the tails of steps, and replays them from then on: one for each number of rows and set of plugins.

    A replay runs what the plugins did on the device when it was captured, without calling them. Graphs share their
    memory, since what one of them writes is read before the next one runs.

    Args:
        table: whose steps.
    """

    def __init__(self, table: BranchTable) -> None:
        device = table.slots.context.device
        self._table = table
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()
        self._captured: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: it cannot be
        self._last: Hashable = None
        self._alike = 0

    def run(self, logits: torch.Tensor, at: Positions) -> tuple[Chosen, torch.Tensor] | None:
        """``choose`` and ``commit_ahead`` as one graph; None: do it without, because it is new, or cannot be captured.

        Args:
            logits: of ``choose``. They and ``at.slot`` must be at the same addresses in each step that is as long.
            at: one position a branch.
        """
        works = self._table.graph_key
        if works is None:
            return None
        key = logits.data_ptr(), at.slot.data_ptr(), len(at.slots), works
        if key not in self._captured:
            self._alike = self._alike + 1 if key == self._last else 1
            self._last = key
            if self._alike < PATIENCE:
                return None
            self._captured[key] = self._capture(logits, at)
            if len(self._captured) > MOST:
                self._captured.popitem(last=False)
        else:
            self._alike = 0
        self._captured.move_to_end(key)
        captured = self._captured[key]
        if captured is None:
            return None
        captured.graph.replay()
        return captured.chosen, captured.tokens

    def _capture(self, logits: torch.Tensor, at: Positions) -> _Captured | None:
        graph: Any = torch.cuda.CUDAGraph()
        failed: list[Exception] = []
        current = torch.cuda.current_stream(logits.device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                # Other threads may go on with what they do on the GPU.
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    chosen = choose(self._table, logits, at, in_place=True)
                    tokens = commit_ahead(self._table, chosen)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            failed.append(error)
        current.wait_stream(self._side)
        failed[:0] = take_failures(self._table).values()
        if failed:
            told = str(failed[0]).strip().split("\n", 1)[0]
            _log.warning(
                "what follows the engine in a step cannot be captured as a CUDA graph, and runs without: %s", told
            )
            self._memory = torch.cuda.graph_pool_handle()  # the other is left as if it were still in use
            return None
        return _Captured(graph, chosen, tokens)
