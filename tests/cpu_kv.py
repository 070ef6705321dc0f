"""How long attention of a decode step takes on a CPU, over numbers and over codes: ``python -m tests.cpu_kv``.

The heads of SmolLM2-135M, 30 layers, one row, bfloat16; one thread. The least of many turns.
"""

from __future__ import annotations

import sys
import time

import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.attention import DecodeAttention
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention, RotaryEmbedding
from trtllm_core.plugin.kv_policy import KVModel, KVPlan

LAYERS, HEADS, KV_HEADS, SIZE, BLOCK, TURNS = 30, 9, 3, 64, 64, 15


def main() -> None:
    torch.set_num_threads(1)
    length, cpu, dtype = int(sys.argv[1]) if len(sys.argv) > 1 else 4096, torch.device("cpu"), torch.bfloat16
    rotary = RotaryEmbedding(SIZE, 10000.0, length)
    rotary.prepare(length, cpu, dtype)
    layers = [Attention(i, HEADS, KV_HEADS, SIZE, rotary=rotary) for i in range(LAYERS)]
    blocks = -(-length // BLOCK)
    inputs = {
        "query_lengths": torch.ones(1, dtype=torch.int32),
        "past_lengths": torch.tensor([length - 1], dtype=torch.int32),
        "block_tables": torch.arange(blocks).int().view(1, -1),
    }
    pools = {}
    for kind in ("bfloat16", "int8", "fp8"):
        plan = KVPlan(blocks, BLOCK, blocks, KVModel(LAYERS, KV_HEADS, SIZE, kind, 0))
        pools[kind] = KVPool(plan, dtype, cpu)
        for cache in pools[kind].layers:
            cache.write(torch.arange(length), torch.randn(length, 2 * KV_HEADS, SIZE).to(dtype))
    native = DecodeAttention(Kernels(dtype, cache_folder()))
    qkv, position = torch.randn(1, HEADS + 2 * KV_HEADS, SIZE).to(dtype), torch.tensor([length - 1])
    best: dict[tuple[str, str], float] = {}
    for _ in range(TURNS):
        for kind, pool in pools.items():
            for name, make in (("compiled", native.context), ("PyTorch", PagedContext)):
                context = make(PackedBatch(inputs, pool.plan, cpu), pool, position)
                start = time.perf_counter()
                for layer in layers:
                    context.attend(layer, qkv.clone())
                taken = time.perf_counter() - start
                best[kind, name] = min(best.get((kind, name), taken), taken)
    for (kind, name), seconds in best.items():
        print(f"{kind:9} {name:9} {1e3 * seconds:8.2f} ms")


if __name__ == "__main__":
    main()
