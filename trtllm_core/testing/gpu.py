"""Running device plugins on a GPU as the loop may: without a sync, and replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trtllm_core.plugin import CommitBatch
from trtllm_core.testing.lives import Rig


@contextmanager
def sync_errors(_: str = "") -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises ``RuntimeError``."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], Any], warm: bool) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and what replaying it writes to. ``warm``: run it once before, which must change nothing."""
    torch.cuda.synchronize()
    if warm:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            call()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


class GraphedCommits:
    """Commits of one token of each slot, replayed from a graph."""

    def __init__(self, rig: Rig[Any], slots: Sequence[int]) -> None:
        self.rig = rig
        self.batch: CommitBatch = rig.floor.chosen({slot: [0] for slot in slots}, scores=rig.scores())
        self.graph, _ = captured(lambda: rig.acting.commit(self.batch), warm=False)

    def commit(self, new: Mapping[int, Sequence[int]]) -> None:
        """As ``Rig.commit``, for the same slots in the same order."""
        fresh = self.rig.floor.chosen(new, scores=self.rig.scores())
        self.batch.tokens.copy_(fresh.tokens)
        if self.batch.source is not None and fresh.source is not None:
            self.batch.source.copy_(fresh.source)
        self.rig.floor.commit(self.batch)
        self.graph.replay()
