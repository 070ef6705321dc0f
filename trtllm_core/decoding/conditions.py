"""What an engine must know of a slot besides its tokens: the adapter and the prompt table of its request."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_core.decoding.request import Request
from trtllm_core.prompt_table import VirtualTokens, virtual_inputs


class Conditions:
    """Kept by slot, and told to the engine only while a request is there that has any."""

    def __init__(self, slots: int) -> None:
        self._adapters = np.full(slots, -1, np.int32)
        self._adapted = 0
        self._tables: dict[int, VirtualTokens] = {}

    def begin(self, slot: int, request: Request) -> None:
        """A branch of ``request`` may run in ``slot``."""
        if request.adapter is not None:
            self._adapters[slot] = request.adapter.index
            self._adapted += 1
        if request.virtual is not None:
            self._tables[slot] = request.virtual

    def end(self, slot: int) -> None:
        """The slot is free."""
        self._tables.pop(slot, None)
        if self._adapters[slot] >= 0:
            self._adapters[slot] = -1
            self._adapted -= 1

    def inputs(self, slots: np.ndarray, row: np.ndarray, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """The engine's further inputs for a step; none while no request has anything.

        Args:
            slots: int64 ``[rows]``.
            row: int64 ``[tokens]``: the row of each token.
            ids: int32 ``[tokens]``: virtual ones are replaced, in place.
        """
        inputs = virtual_inputs(ids, slots[row], self._tables) if self._tables else {}
        if self._adapted:
            inputs["lora_ids"] = torch.from_numpy(self._adapters[slots])
        return inputs
