"""What keys and values as codes do to decode steps on a GPU: ``python -m tests.cuda_kv llama-3-8b 1x8000,32x8000``.

For each way of keeping them and each ``batch x cached tokens``: the time of the engine's part of a step, and the bytes
that it must read. Then a chunk of a prompt behind others, and what a GiB holds. Random weights.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from tests.cuda_steps import executed
from trtllm_core import BuildConfig, KVCacheConfig
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.cli.bench.random_engine import random_runner
from trtllm_core.testing.packed import kv_plan

CHUNK = 2048


def load(shape: str, batch: int, longest: int) -> TorchExecutable:
    """An engine with random weights."""
    limits = BuildConfig(
        max_batch_size=batch, max_seq_len=longest, max_input_len=longest - 1, max_num_tokens=max(CHUNK, batch)
    )
    engine = random_runner(shape, limits, "cuda", kv_cache=KVCacheConfig(max_tokens=longest)).generation.session.engine
    assert isinstance(engine, TorchExecutable)
    return engine


def keep(engine: TorchExecutable, kind: str, tokens: int) -> int:
    """Allocate the cache of ``tokens`` tokens anew, kept as ``kind``. Returns the bytes of a token."""
    config = engine.config.replace(build=engine.config.build.replace(kv_dtype=kind))
    engine.allocate_kv(kv_plan(config, -(-tokens // config.build.tokens_per_block)))
    return config.model.kv_bytes_per_token(kind)


def prompt(engine: TorchExecutable, count: int, past: int, repeats: int = 3) -> float:
    """Seconds of one call with ``count`` tokens of a prompt behind ``past``: the median."""
    assert engine._pool is not None
    blocks = -(-(past + count) // engine._pool.plan.tokens_per_block)
    inputs = {
        "input_ids": torch.randint(0, engine.config.model.vocab_size, (count,)),
        "position_ids": torch.arange(past, past + count),
        "query_lengths": torch.tensor([count], dtype=torch.int32),
        "past_lengths": torch.tensor([past], dtype=torch.int32),
        "block_tables": torch.randperm(engine._pool.plan.num_blocks)[:blocks].int().view(1, -1),
        "logits_indices": torch.tensor([count - 1]),
    }
    outputs = {"logits": torch.empty(1, engine.config.vocab_size_padded, device="cuda")}
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.execute(inputs, outputs, 0)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def main() -> None:
    shape = sys.argv[1]
    cases = [tuple(map(int, case.split("x"))) for case in sys.argv[2].split(",")]
    engine = load(shape, max(batch for batch, _ in cases), max(past for _, past in cases) + 64)
    model = engine.config.model
    table = 0 if engine.module.head is None else model.vocab_size * model.hidden_size * 2  # of a step, a few rows
    print(torch.cuda.get_device_name(), torch.__version__, shape, model.dtype, flush=True)
    for kind in (model.dtype, "fp8", "int8"):
        per_token = keep(engine, kind, max(batch * (past + 64) for batch, past in cases))
        print(f"{kind}: {per_token} bytes a token, {2**30 // per_token} tokens a GiB")
        for batch, past in cases:
            step = executed(engine, batch, past)
            read = engine.weight_bytes() - table + batch * past * per_token
            print(
                f"  {batch} x {past}: engine {1e3 * step:.2f} ms, {batch / step:.0f} tokens/s, "
                f"{read / step / 1e9:.0f} GB/s of {read / 1e9:.1f} GB"
            )
        past = max(past for _, past in cases) - CHUNK
        print(f"  {CHUNK} tokens of a prompt behind {past}: {1e3 * prompt(engine, CHUNK, past):.1f} ms", flush=True)


if __name__ == "__main__":
    main()
