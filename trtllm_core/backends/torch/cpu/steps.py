"""Decode steps as programs: recorded once for each number of rows, and run in one call from then on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trtllm_core.backends.torch.batch import host, is_all, is_decode
from trtllm_core.backends.torch.cpu.attention import DecodeAttention
from trtllm_core.backends.torch.cpu.operations import Rows
from trtllm_core.backends.torch.cpu.product import DIRECT_UP_TO
from trtllm_core.backends.torch.cpu.program import NotRecordableError, Program, Watch
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention

_log = logging.getLogger(__name__)


class RecordedContext:
    """The ``AttentionContext`` of a program, whose rows change from step to step."""

    def __init__(self, attention: DecodeAttention, pool: KVPool, rows: Rows, positions: torch.Tensor) -> None:
        self.positions = positions
        self._attention, self._pool, self._rows = attention, pool, rows

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [rows, heads + 2 * kv_heads, head_size]``."""
        heads = self._attention.heads(layer)
        if heads is None:
            raise NotRecordableError("attention that has no kernel")
        return self._attention.kernels.attend(self._rows, heads, qkv, self._pool.layers[layer.index])


class DecodeProgram:
    """Of steps of so many rows.

    Raises:
        NotRecordableError: the module does more than there are operations for.
    """

    def __init__(self, module: Any, pool: KVPool, attention: DecodeAttention, count: int) -> None:
        self._ids = torch.zeros(count, dtype=torch.int32)
        self._positions = torch.zeros(count, dtype=torch.int64)
        self._lengths = np.zeros(count, np.int64)
        self._rows = Rows(
            lengths=self._lengths.ctypes.data,
            positions=self._positions.data_ptr(),
            rows=count,
            block_size=pool.plan.tokens_per_block,
        )
        context = RecordedContext(attention, pool, self._rows, self._positions)
        with attention.kernels.record() as program, Watch():  # type: ignore[no-untyped-call]
            self._logits: torch.Tensor = module.logits(module(self._ids, context))
        self.program: Program = program

    def run(self, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Run such a step, described on the host. ``logits`` is float32 ``[asked, vocab]``."""
        tables, asked = host(inputs["block_tables"]), inputs["logits_indices"]
        assert tables.strides[1] == tables.itemsize == 4, "block tables are int32, row by row"
        self._ids.copy_(inputs["input_ids"])
        self._positions.copy_(inputs["position_ids"])
        np.add(host(inputs["past_lengths"]), 1, out=self._lengths)
        self._rows.tables, self._rows.table_stride = tables.ctypes.data, tables.strides[0] // tables.itemsize
        self.program.run()
        logits.copy_(self._logits if is_all(asked, len(self._ids)) else self._logits[asked])


class StepPrograms:
    """All programs of an engine over one pool.

    Args:
        module: the family's, its weights in place.
        pool: whose addresses the programs hold. Another pool needs other programs.
        attention: and with it the kernels.
    """

    def __init__(self, module: Any, pool: KVPool, attention: DecodeAttention) -> None:
        self._module, self._pool, self._attention = module, pool, attention
        self.programs: dict[int, DecodeProgram] = {}
        self.refused: str | None = None
        """What the module does that no program can."""

    def find(self, inputs: Mapping[str, torch.Tensor]) -> DecodeProgram | None:
        """The program that runs a call; None: it takes the eager road."""
        count = inputs["query_lengths"].shape[0]
        known = self.programs.get(count)
        if (known is None and self.refused is not None) or count > DIRECT_UP_TO or not is_decode(inputs):
            return None
        return known or self._recorded(count)

    def _recorded(self, count: int) -> DecodeProgram | None:
        try:
            made = self.programs[count] = DecodeProgram(self._module, self._pool, self._attention, count)
        except NotRecordableError as error:
            self.refused = str(error)
            _log.info("decode steps are not recorded: the module uses %s", error)
            return None
        return made
