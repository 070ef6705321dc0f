"""Whether blocks should come back from the host, or be computed anew: ``python -m tests.cuda_offload llama-3-8b``.

For prompts of several lengths: the time of copying their keys and values to pinned memory, and back to other blocks,
beside that of computing them in one call. Random weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from tests.cuda_kv import CHUNK, keep, load, prompt
from trtllm_core.backends.torch.host_blocks import HostBlocks

LENGTHS = (64, 512, 2048, 8128)


def seconds(work: Callable[[], None]) -> float:
    """Until the device is done: the median of five, after one."""
    taken = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def main() -> None:
    shape = sys.argv[1]
    engine = load(shape, 1, max(LENGTHS) + 64)
    print(torch.cuda.get_device_name(), torch.__version__, shape, engine.config.model.dtype, flush=True)
    for kind in (engine.config.model.dtype, "int8"):
        per_token = keep(engine, kind, 4 * max(LENGTHS))
        pool = engine._pool
        assert pool is not None
        size, count = pool.plan.tokens_per_block, max(LENGTHS) // pool.plan.tokens_per_block
        parts = [pool.storage] if pool.scales is None else [pool.storage, pool.scales]
        host = HostBlocks([part.view(part.shape[0], pool.plan.num_blocks, -1) for part in parts], count)
        for length in LENGTHS:
            blocks, places = torch.randperm(pool.plan.num_blocks).tolist(), torch.randperm(count).tolist()
            pairs = list(zip(blocks, places[: length // size], strict=False))
            out = seconds(partial(host.save, pairs))
            back = seconds(partial(host.load, [(place, block) for block, place in pairs]))
            starts = range(0, length, CHUNK)
            anew = sum(prompt(engine, min(CHUNK, length - start), start) for start in starts)
            moved = length * per_token
            print(
                f"{kind}, {length} tokens ({moved / 2**20:.0f} MiB): out {1e3 * out:.2f} ms ({moved / out / 1e9:.0f} "
                f"GB/s), back {1e3 * back:.2f} ms ({moved / back / 1e9:.0f} GB/s), computed anew {1e3 * anew:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
