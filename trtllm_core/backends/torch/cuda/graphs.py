"""Steps as captured CUDA graphs: ``forward[bucket]``, from token ids to logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from trtllm_core.backends.torch.batch import host, is_all, is_decode, is_prompt
from trtllm_core.backends.torch.cuda.context import Packed, Prompts, attend_prompts, is_fused
from trtllm_core.backends.torch.cuda.inputs import DecodeInputs
from trtllm_core.backends.torch.cuda.kernels.attention import decode_attention
from trtllm_core.backends.torch.cuda.kernels.prompt import place_prompt
from trtllm_core.backends.torch.cuda.kernels.rows import DecodeRows
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.errors import BackendError
from trtllm_core.nn import Attention

WARM_UPS = 2
"""Runs before a capture: kernels are compiled, and libraries allocate what they keep."""

PROMPTS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Lengths that the graphs of prompts are captured for. From the longest on, the host keeps up with the GPU."""


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


class PromptContext(DecodeContext):
    """Of a step that is one whole prompt, each of its tokens described like a row."""

    def __init__(self, rows: DecodeRows, pool: KVPool, length: int) -> None:
        super().__init__(rows, pool)
        starts = torch.arange(0, length + 1, length, dtype=torch.int32, device=rows.past.device)
        whole = Packed(starts, length)
        self._prompts = Prompts(slice(0, length), whole, whole)

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        cache = self._pool.layers[layer.index]
        qkv = place_prompt(layer, qkv.contiguous(), cache, self._rows, self._pool.plan.tokens_per_block)
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        return attend_prompts(layer, q, kv, self._prompts).flatten(1)


class Graphs:
    """Captures each bucket when it is first needed, and replays it from then on.

    In steady state a step is one copy of its inputs, one replay, and one copy of its logits: nothing is allocated, and
    nobody waits. All graphs share their memory, since only one runs at a time.

    Args:
        module: the family's, its weights in place.
        pool: whose addresses the graphs will hold. Another pool needs other graphs.
        sizes: the buckets, ascending.
        inputs: room for the largest of them.
        memory: of ``torch.cuda.graph_pool_handle``.
        switch: turns on the module's kernels, while it is captured.
    """

    def __init__(
        self, module: Any, pool: KVPool, sizes: Sequence[int], inputs: DecodeInputs, memory: Any, switch: Switch
    ) -> None:
        self._module = module
        self._pool = pool
        self._inputs = inputs
        self._switch = switch
        self._memory = memory
        self._device = inputs.device
        self._side = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
        self._bucket_of = {n: next(size for size in sizes if size >= n) for n in range(1, sizes[-1] + 1)}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @property
    def captured(self) -> int:
        """Graphs that there are."""
        return len(self._graphs)

    def graph(self, size: int) -> tuple[int, torch.cuda.CUDAGraph, torch.Tensor]:
        """The bucket for ``size``, its graph, and the logits that it writes.

        Raises:
            BackendError: the family's module cannot be captured.
        """
        bucket = self._bucket_of[size]
        return bucket, *(self._graphs.get(bucket) or self._capture(bucket))

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._inputs.clear(bucket)
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UPS):
                self._forward(bucket)
        current.wait_stream(self._side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=self._side):
                out = self._forward(bucket)
        except RuntimeError as error:
            raise BackendError(
                f"the model's forward pass cannot be captured as a CUDA graph ({_first_line(error)}): "
                "load the engine with cuda_graphs=False"
            ) from error
        self._graphs[bucket] = graph, out
        return graph, out

    def _rows(self, bucket: int) -> DecodeRows:
        plan = self._pool.plan
        return self._inputs.rows(bucket, plan.max_blocks_per_slot * plan.tokens_per_block)

    def _forward(self, bucket: int) -> torch.Tensor:
        raise NotImplementedError


class DecodeGraphs(Graphs):
    """Of steps in which every row has one token; a bucket is a number of rows."""

    def run(self, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Run such a step: ``input_ids`` on the host or on the device, everything else on the host.

        ``logits`` is float32 ``[asked, vocab]`` on the device, written in the order of the current stream.
        """
        past, ids, asked = host(inputs["past_lengths"]), inputs["input_ids"], inputs["logits_indices"]
        count = len(past)
        bucket, graph, out = self.graph(count)
        self._inputs.send(
            bucket,
            ids if ids.is_cuda else host(ids),
            host(inputs["position_ids"]),
            past,
            host(inputs["block_tables"]),
            self._pool.plan.tokens_per_block,
        )
        graph.replay()
        logits.copy_(out[:count] if is_all(asked, count) else out[asked.to(out.device, non_blocking=True)])

    def _forward(self, bucket: int) -> torch.Tensor:
        context = DecodeContext(self._rows(bucket), self._pool)
        with self._switch.turned_on():
            return self._module.logits(self._module(self._inputs.ids(bucket), context))  # type: ignore[no-any-return]


class PromptGraphs(Graphs):
    """Of steps that are one prompt, whose last token alone is asked for; a bucket is a number of tokens."""

    def run(self, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Run such a step, all of it described on the host. ``logits`` is as of ``DecodeGraphs.run``, one row."""
        ids = host(inputs["input_ids"])
        bucket, graph, out = self.graph(len(ids))
        self._inputs.send(
            bucket,
            ids,
            host(inputs["position_ids"]),
            np.arange(len(ids)),
            host(inputs["block_tables"]),
            self._pool.plan.tokens_per_block,
        )
        graph.replay()
        logits.copy_(out)

    def _forward(self, bucket: int) -> torch.Tensor:
        context = PromptContext(self._rows(bucket), self._pool, bucket)
        with self._switch.turned_on():
            hidden = self._module(self._inputs.ids(bucket), context)
            return self._module.logits(hidden.index_select(0, self._inputs.last))  # type: ignore[no-any-return]


class StepGraphs:
    """All graphs of an engine over one pool.

    Args:
        module, pool, switch: as of ``Graphs``.
        rows: most rows of a step.
        tokens: most tokens of a step.
        device: a CUDA device.
    """

    def __init__(self, module: Any, pool: KVPool, rows: int, tokens: int, device: torch.device, switch: Switch) -> None:
        memory, width = torch.cuda.graph_pool_handle(), pool.plan.max_blocks_per_slot
        self.decode = DecodeGraphs(
            module, pool, buckets(rows), DecodeInputs(rows, rows * width, device), memory, switch
        )
        layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
        self.prompts: PromptGraphs | None = None
        if all(is_fused(layer, pool.dtype) for layer in layers):
            sizes = [size for size in PROMPTS if size < tokens] or [tokens]
            room = DecodeInputs(sizes[-1], width, device)
            self.prompts = PromptGraphs(module, pool, sizes, room, memory, switch)
            self._longest = sizes[-1]

    def find(self, inputs: Mapping[str, torch.Tensor]) -> DecodeGraphs | PromptGraphs | None:
        """The graphs that run a call; None: it takes the eager road."""
        if is_decode(inputs):
            return self.decode
        return self.prompts if self.prompts is not None and is_prompt(inputs, self._longest) else None


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n", 1)[0]
