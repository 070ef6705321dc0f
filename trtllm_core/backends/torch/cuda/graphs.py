"""Decode steps as captured CUDA graphs: ``forward[bucket]``, from token ids to logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from trtllm_core.backends.torch.batch import host
from trtllm_core.backends.torch.cuda.inputs import DecodeInputs
from trtllm_core.backends.torch.cuda.kernels.attention import DecodeRows, decode_attention
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.errors import BackendError
from trtllm_core.nn import Attention

WARM_UPS = 2
"""Runs before a capture: kernels are compiled, and libraries allocate what they keep."""


def buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for, up to ``most``: powers of two, and from 16 on half-way ones."""
    out, size = [], 1
    while size < most:
        out.append(size)
        if size >= 16 and size * 3 // 2 < most:
            out.append(size * 3 // 2)
        size *= 2
    return [*out, most]


class DecodeContext:
    """The ``AttentionContext`` of a step in which every row has one token, described on the device."""

    def __init__(self, rows: DecodeRows, pool: KVPool) -> None:
        self._rows = rows
        self._pool = pool

    @cached_property
    def positions(self) -> torch.Tensor:
        """See ``AttentionContext``."""
        return self._rows.positions.long()

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [rows, heads + 2 * kv_heads, head_size]``."""
        cache = self._pool.layers[layer.index]
        return decode_attention(layer, qkv.contiguous(), cache, self._rows, self._pool.plan.tokens_per_block)


class ForwardGraphs:
    """Captures each bucket when it is first needed, and replays it from then on.

    In steady state a step is one copy of its inputs, one replay, and one copy of its logits: nothing is allocated, and
    nobody waits. All graphs share their memory, since only one runs at a time.

    Args:
        module: the family's, its weights in place.
        pool: whose addresses the graphs will hold. Another pool needs other graphs.
        rows: most rows of a step.
        device: a CUDA device.
        switch: turns on the module's kernels, while it is captured.
    """

    def __init__(self, module: Any, pool: KVPool, rows: int, device: torch.device, switch: Switch) -> None:
        self._module = module
        self._pool = pool
        self._switch = switch
        self._inputs = DecodeInputs(rows, pool.plan.max_blocks_per_slot, device)
        self._buckets = buckets(rows)
        self._bucket_of = {n: next(b for b in self._buckets if b >= n) for n in range(1, rows + 1)}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._memory: Any = None
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device

    @property
    def captured(self) -> int:
        """Graphs that there are."""
        return len(self._graphs)

    def run(self, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor, asked: torch.Tensor | None) -> None:
        """Run a step of one token a row.

        Args:
            inputs: of the packed contract; lengths, positions and tables on the host, ``input_ids`` there or on the
                device.
            logits: float32 ``[asked, vocab]``, on the device, written in the order of the current stream.
            asked: int64: rows whose logits are wanted; None: all, in order.

        Raises:
            BackendError: the family's module cannot be captured.
        """
        past, ids = host(inputs["past_lengths"]), inputs["input_ids"]
        count = len(past)
        bucket = self._bucket_of[count]
        graph, out = self._graphs.get(bucket) or self._capture(bucket)
        self._inputs.send(
            bucket,
            ids if ids.is_cuda else host(ids),
            host(inputs["position_ids"]),
            past,
            host(inputs["block_tables"]),
            self._pool.plan.tokens_per_block,
        )
        graph.replay()
        logits.copy_(out[:count] if asked is None else out[asked])

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._inputs.clear(bucket)
        current, side = torch.cuda.current_stream(self._device), self._side
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(bucket)
        current.wait_stream(side)
        torch.cuda.synchronize(self._device)
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=side):
                out = self._forward(bucket)
        except RuntimeError as error:
            raise BackendError(
                f"the model's forward pass cannot be captured as a CUDA graph ({_first_line(error)}): "
                "load the engine with cuda_graphs=False"
            ) from error
        self._graphs[bucket] = graph, out
        return graph, out

    def _forward(self, bucket: int) -> torch.Tensor:
        context = DecodeContext(self._inputs.rows(bucket), self._pool)
        with self._switch.turned_on():
            return self._module.logits(self._module(self._inputs.ids(bucket), context))  # type: ignore[no-any-return]


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n", 1)[0]
