"""How fast decode steps are on a GPU: ``python -m tests.cuda_steps llama-3-8b 1,32,256 [OPTION …]``.

For each batch: tokens a second of ``ModelRunner.generate`` (greedy) while all of it generate; the time until then;
and the time of the engine's part of a step alone (inputs, forward pass, logits), with the bytes that it must read.
Random weights. ``--eager``: without graphs and kernels of our own. ``--quant``: fp8, int8 or int4, ``int4:128`` for
groups of 128 without zero points. ``--sampled``: every row with a temperature, top-p and a repetition penalty.
``--plugins``: five more, which all read the logits and keep a count.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.cli.bench.random_engine import random_runner
from trtllm_core.config import QuantizationConfig
from trtllm_core.plugin import CommitBatch, DecodingContext, DeviceLogitsProcessor, LogitsBatch, LogitsCapabilities

LONGEST, REPEATS, STEPS = 512, 3, 30
GREEDY = SamplingConfig(end_id=())
SAMPLED = GREEDY.replace(temperature=0.8, top_k=0, top_p=0.9, repetition_penalty=1.2, random_seed=1)


class Counts(DeviceLogitsProcessor):
    """Reads all logits and keeps a count: the least that a plugin with state does."""

    capabilities = LogitsCapabilities(graph_safe=True)

    def setup(self, context: DecodingContext) -> None:
        self.tokens = torch.zeros(context.slots, dtype=torch.int64, device=context.device)
        self.largest = torch.zeros(context.slots, device=context.device)

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        self.largest.index_put_((batch.slot,), logits.amax(-1))

    def commit(self, batch: CommitBatch) -> None:
        self.tokens.index_add_(0, batch.slot, batch.counts)


def load(shape: str, batch: int, graphs: bool, quant: str | None = None) -> ModelRunner:
    """A runner over random weights."""
    limits = BuildConfig(max_batch_size=batch, max_seq_len=LONGEST, max_input_len=LONGEST - 1, max_num_tokens=8192)
    if quant is not None:
        weights, _, group = quant.partition(":")
        wish = {"group_size": int(group), "symmetric": True if weights == "int4" else None} if group else {}
        limits = limits.replace(quantization=QuantizationConfig(weights=weights, **wish))  # type: ignore[arg-type]
    return random_runner(shape, limits, "cuda", cuda_graphs=graphs)


def generated(
    runner: ModelRunner, batch: int, prompt: int, new: int, sampling: SamplingConfig = GREEDY, plugins: int = 0
) -> tuple[float, float]:
    """Tokens a second while all of the batch generate, and seconds until a batch's first tokens: medians."""
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, runner.config.model.vocab_size, (batch, prompt), generator=random).tolist()
    options: dict[str, Any] = {"streaming": True, "logits_processor": [Counts() for _ in range(plugins)] or None}

    def run(tokens: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        start, seen, told, since = time.perf_counter(), set[str](), 0, 0.0
        for delta in runner.generate(prompts, sampling, max_new_tokens=tokens, **options):
            if len(seen) < batch:
                seen.add(delta.request_id)
                since = time.perf_counter()
            else:
                told += len(delta.tokens)
        return since - start, told / (time.perf_counter() - since) if told else 0.0

    run(8)
    firsts, rates = zip(*(run(new + 1) for _ in range(REPEATS)), strict=True)
    return median(rates), median(firsts)


def executed(engine: TorchExecutable, batch: int, past: int) -> float:
    """Seconds of the engine's part of a step whose rows have ``past`` tokens each, in blocks in disorder."""
    pool = engine._pool
    assert pool is not None
    plan, blocks = pool.plan, past // pool.plan.tokens_per_block + 1
    tables = torch.full((batch, plan.max_blocks_per_slot), -1, dtype=torch.int32)
    tables[:, :blocks] = torch.randperm(plan.num_blocks)[: batch * blocks].int().view(batch, blocks)
    inputs = {
        "input_ids": torch.randint(0, engine.config.model.vocab_size, (batch,)),
        "position_ids": torch.full((batch,), past),
        "query_lengths": torch.ones(batch, dtype=torch.int32),
        "past_lengths": torch.full((batch,), past, dtype=torch.int32),
        "block_tables": tables,
        "logits_indices": torch.arange(batch),
    }
    outputs = {"logits": torch.empty(batch, engine.config.vocab_size_padded, device="cuda")}
    for _ in range(5):
        engine.execute(inputs, outputs, 0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.execute(inputs, outputs, 0)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    shape, batches = sys.argv[1], [int(batch) for batch in sys.argv[2].split(",")]
    quant = sys.argv[sys.argv.index("--quant") + 1] if "--quant" in sys.argv else None
    runner = load(shape, max(batches), "--eager" not in sys.argv, quant)
    engine = runner.generation.session.engine
    assert isinstance(engine, TorchExecutable)
    model = engine.config.model
    table = 0 if engine.module.head is None else model.vocab_size * model.hidden_size * 2  # of a step, a few rows
    print(torch.cuda.get_device_name(), torch.__version__, shape, quant or model.dtype)
    for batch in batches:
        prompt, new = (128, 255) if batch == 1 else (256, 64)
        sampling, plugins = SAMPLED if "--sampled" in sys.argv else GREEDY, 5 if "--plugins" in sys.argv else 0
        rate, first = generated(runner, batch, prompt, new, sampling, plugins)
        past = prompt + new // 2
        step = executed(engine, batch, past)
        cache = batch * past * 4 * model.num_kv_heads * model.head_size * model.num_layers
        read = (engine.weight_bytes() - table + cache) / step / 1e9
        print(
            f"batch {batch}: {rate:.0f} tokens/s ({1e3 * batch / rate:.2f} ms a step), first {1e3 * first:.1f} ms; "
            f"engine {1e3 * step:.3f} ms, {batch / step:.0f} tokens/s, {read:.0f} GB/s"
        )


if __name__ == "__main__":
    main()
