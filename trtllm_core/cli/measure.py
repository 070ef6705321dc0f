"""Timing a loaded engine, and what the machine could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trtllm_core.runner import ModelRunner


@dataclass(frozen=True)
class Timing:
    """One timed generation."""

    prefill_seconds: float
    """Until every prompt had its first token."""
    decode_seconds: float
    decode_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is timed: how many prompts, how long, and how many new tokens each. One new token measures prefill."""

    name: str
    batch: int
    prompt_len: int
    new_tokens: int

    @property
    def is_prefill(self) -> bool:
        """Whether reading the prompt is what counts."""
        return self.new_tokens == 1

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, the same ones in every process."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.batch, self.prompt_len), generator=generator).tolist()

    def rate(self, timing: Timing) -> float:
        """Tokens a second."""
        if self.is_prefill:
            return self.batch * self.prompt_len / timing.prefill_seconds
        return timing.decode_tokens / timing.decode_seconds


def time_engine(runner: ModelRunner, work: Workload) -> Timing:
    """Generate greedily to a fixed length, timed through streaming as a user would see it."""
    from trtllm_core.config import SamplingConfig

    prompts = work.prompts(runner.vocab_size)
    sampling = SamplingConfig(max_new_tokens=work.new_tokens, end_id=())
    waiting, late = {str(i) for i in range(work.batch)}, 0
    started = first = time.perf_counter()
    for delta in runner.generate(prompts, sampling, streaming=True):
        if waiting:
            waiting.discard(delta.request_id)
            if not waiting:
                first = time.perf_counter()
        else:
            late += len(delta.tokens)
    return Timing(first - started, time.perf_counter() - first, late)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(runner: ModelRunner, work: Workload) -> float:
    """Bytes that a decode step must read: all weights, and the KV cache at its mean length."""
    per_token = runner.config.model.kv_bytes_per_token(runner.config.kv_dtype, runner.config.build.tp_size)
    return runner.context_mem_size + work.batch * (work.prompt_len + work.new_tokens / 2) * per_token


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def peak_memory() -> int:
    """Most memory that this process ever had resident, in bytes.

    Not ``ru_maxrss`` on Linux: a child inherits that of the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
