"""The attention formula, element by element in float64, and sequences of random tokens to try it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.attention import DecodeAttention
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.plain import PlainContext
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin.kv_policy import KVModel, KVPlan

BLOCK, LONGEST, CPU = 8, 160, torch.device("cpu")


def compiled_context(batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> PagedContext:
    """With our own kernel where every row runs one token."""
    try:
        kernels = Kernels(pool.dtype, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))
    return DecodeAttention(kernels).context(batch, pool, positions)


Context = Callable[[PackedBatch, KVPool, torch.Tensor], PagedContext]


def layer(heads: int = 4, kv_heads: int = 2, size: int = 32, rotary: int | None = None, alibi: bool = False,
          **options: Any) -> Attention:  # fmt: skip
    """A layer that is ready: ``rotary`` is the rotated part of a head."""
    turn = None if rotary is None else RotaryEmbedding(rotary, 10000.0, LONGEST)
    bias = Alibi(heads, TensorParallel()) if alibi else None
    if turn:
        turn.prepare(LONGEST, CPU, torch.float32)
    if bias:
        bias.prepare(CPU)
    return Attention(0, heads, kv_heads, size, rotary=turn, alibi=bias, **options)


class Rows:
    """Sequences of random queries, keys and values, and a pool with blocks in disorder for them; ``ring`` is window and
    sinks of their caches, ``kv`` how they are kept."""

    def __init__(
        self,
        attention: Attention,
        lengths: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        ring: tuple[int | None, int] = (None, 0),
        device: torch.device = CPU,
        kv: str | None = None,
        **plan: Any,
    ) -> None:
        self.layer, self.device = attention, device
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        random = torch.Generator().manual_seed(sum(lengths))
        self.qkv = [torch.randn(n, heads + 2 * kv_heads, size, generator=random) for n in lengths]
        self.qkv = [(2 * x).to(dtype) for x in self.qkv]
        blocks = -(-LONGEST // BLOCK)
        self.blocks = np.random.default_rng(0).permutation(len(lengths) * blocks).astype(np.int32).reshape(-1, blocks)
        model = KVModel(1, kv_heads, size, kv or str(dtype).removeprefix("torch."), 0)
        if ring[0] is not None:  # a ring has no more blocks than it needs
            self.blocks[:, -(-ring[0] // BLOCK) :] = -1
        self.plan = KVPlan(self.blocks.size, BLOCK, blocks, model, *ring, **plan)
        self.pool = KVPool(self.plan, dtype, device)
        self.past = [0] * len(lengths)

    def run(self, counts: dict[int, int], context: Context) -> dict[int, torch.Tensor]:
        """The next ``counts[row]`` tokens of each row, in one call."""
        rows, past = list(counts), [self.past[row] for row in counts]
        inputs = {
            "query_lengths": torch.tensor(list(counts.values()), dtype=torch.int32),
            "past_lengths": torch.tensor(past, dtype=torch.int32),
            "block_tables": torch.from_numpy(self.blocks[rows]),
        }
        positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past, counts.values(), strict=True)])
        packed = torch.cat([self.qkv[row][p : p + counts[row]] for row, p in zip(rows, past, strict=True)])
        made = context(PackedBatch(inputs, self.plan, self.device), self.pool, positions.to(self.device))
        out = self.layer(packed.to(self.device, copy=True), made).cpu()
        self.looked = made.scores if isinstance(made, PlainContext) else []
        for row, count in counts.items():
            self.past[row] += count
        return dict(zip(rows, torch.split(out, list(counts.values())), strict=True))

    def cut(self, sizes: list[list[int]], context: Context) -> list[torch.Tensor]:
        """Every row in pieces, taken from ``sizes`` in turn, all rows together."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.qkv]
        for turn in range(LONGEST):
            left = [len(x) - past for x, past in zip(self.qkv, self.past, strict=True)]
            counts = {row: min(sizes[turn % len(sizes)][row % 4], n) for row, n in enumerate(left)}
            counts = {row: n for row, n in counts.items() if n}
            for row, out in self.run(counts, context).items() if counts else ():
                parts[row].append(out)
        return [torch.cat(part) for part in parts]

    def expected(self) -> list[torch.Tensor]:
        return [reference(self.layer, x.double(), self.plan).float() for x in self.qkv]


def reference(layer: Attention, qkv: torch.Tensor, plan: KVPlan) -> torch.Tensor:
    """``qkv [n, heads + 2 * kv_heads, d]`` -> ``[n, heads * d]``, element by element as the papers have it."""
    return torch.einsum("hij,jhd->ihd", *weights_and_values(layer, qkv, plan)).flatten(1)


def chances(layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
    """``[heads, n, n]``: how much each token looks at each."""
    return weights_and_values(layer, qkv, None)[0]


def weights_and_values(layer: Attention, qkv: torch.Tensor, plan: KVPlan | None) -> tuple[torch.Tensor, torch.Tensor]:
    heads, kv_heads, n = layer.num_heads, layer.num_kv_heads, len(qkv)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if layer.rotary is not None:
        half = layer.rotary.dim // 2
        turns = torch.polar(
            torch.ones(n, half).double(), torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
        )[:, None]

        def rotated(x: torch.Tensor) -> torch.Tensor:
            turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turns
            return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

        q, k = rotated(q), rotated(k)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if layer.alibi is not None:
        scores = scores - torch.tensor(layer.alibi.slopes).double()[:, None, None] * distance
    seen = distance >= 0
    if layer.sliding_window is not None:
        seen &= distance < layer.sliding_window
    if plan is not None and plan.window is not None:
        seen &= (distance < plan.window - plan.sink) | (torch.arange(n) < plan.sink)
    return scores.masked_fill(~seen, -math.inf).softmax(-1), v


def streaming(layer: Attention, qkv: torch.Tensor, plan: KVPlan) -> torch.Tensor:
    """As StreamingLLM has it: for each token what its cache holds, oldest first, and its places there as positions."""
    heads, kv_heads, n = layer.num_heads, layer.num_kv_heads, len(qkv)
    half = 0 if layer.rotary is None else layer.rotary.dim // 2

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [places, heads, d]
        angle = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(half).double() / max(half, 1))
        turned = (
            torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    out = []
    for i in range(n):
        window = n if plan.window is None else plan.window
        held = [p for p in range(i + 1) if p < plan.sink or p > i - (window - plan.sink)]
        kept = torch.tensor(held)
        place = torch.arange(len(held))
        places = qkv[kept]
        q = rotated(places[:, :heads])[-1]
        k = rotated(places[:, heads : heads + kv_heads]).repeat_interleave(heads // kv_heads, 1)
        v = places[:, heads + kv_heads :].repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("hd,jhd->hj", q, k) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if layer.alibi is not None:
            scores = scores - torch.tensor(layer.alibi.slopes).double()[:, None] * (len(held) - 1 - place)
        if layer.sliding_window is not None:
            scores = scores.masked_fill(kept <= i - layer.sliding_window, -math.inf)
        out.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(out)


def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max((a.float() - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


LENGTHS = (33, 1, 70, 52)
CUTS = {
    "whole": [[70, 70, 70, 70]],
    "steps": [[1, 1, 1, 1]],
    "alone": [[70, 0, 0, 0], [0, 1, 0, 0], [0, 0, 40, 0], [0, 0, 1, 0], [0, 0, 40, 0], [0, 0, 0, 70]],
    "ragged": [[5, 1, 40, 3], [1, 0, 1, 1], [9, 0, 2, 1], [1, 1, 1, 40]],
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": 32},
    "partial": {"rotary": 8},
    "alibi": {"alibi": True},
    "alibi, three heads": {"heads": 3, "kv_heads": 3, "alibi": True},
    "alibi, six heads of two": {"heads": 6, "kv_heads": 2, "alibi": True},
    "alibi, one kv head": {"heads": 5, "kv_heads": 1, "alibi": True, "sliding_window": 11},
    "softcap": {"softcap": 3.0},
    "softcap, window": {"softcap": 3.0, "rotary": 16, "sliding_window": 9, "kv_heads": 4},
    "all": {"softcap": 3.0, "rotary": 16, "alibi": True, "sliding_window": 11, "scale": 0.3},
    "window": {"rotary": 32, "sliding_window": 11},
}
RINGS = {"ring": (19, 0), "sinks": (24, 4), "one": (6, 5), "never full": (100, 3)}
WITHIN = {
    "rotary": {"rotary": 32},
    "partial": {"rotary": 8, "kv_heads": 1},
    "alibi": {"alibi": True},
    "all": {"softcap": 3.0, "rotary": 16, "alibi": True, "sliding_window": 21, "scale": 0.3},
}
