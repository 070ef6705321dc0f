"""Timing a loaded engine as a user sees it, through streaming."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.workloads import Workload

if TYPE_CHECKING:
    import torch

    from trtllm_core.runner import ModelRunner


@dataclass(frozen=True)
class Timing:
    """One timed generation, in seconds."""

    prefill_seconds: float
    """Until every prompt had its first token."""
    decode_seconds: float
    decode_tokens: int
    gaps: tuple[float, ...] = ()
    """Between each sequence's tokens that came one after the other; empty where nobody looked."""
    cpu_seconds: float = 0.0
    """That all threads of the process computed while it decoded: what other work on the machine hardly changes."""

    def rate(self, work: Workload) -> float:
        """Tokens a second: of prompts where only those count, else generated ones."""
        if work.is_prefill:
            return work.batch * work.prompt_len / self.prefill_seconds
        return self.decode_tokens / self.decode_seconds


def time_engine(runner: ModelRunner, work: Workload) -> Timing:
    """Generate greedily to a fixed length."""
    from trtllm_core.config import SamplingConfig

    prompts = work.prompts(runner.vocab_size)
    sampling = SamplingConfig(max_new_tokens=work.new_tokens, end_id=())
    waiting, late = {str(i) for i in range(work.batch)}, 0
    times: dict[str, list[float]] = {name: [] for name in waiting}
    clock = time.perf_counter
    busy = time.process_time()
    started = first = clock()
    for delta in runner.generate(prompts, sampling, streaming=True):
        now = clock()
        times[delta.request_id].append(now)
        if waiting:
            waiting.discard(delta.request_id)
            if not waiting:
                first, busy = now, time.process_time()
        else:
            late += len(delta.tokens)
    decoding = clock() - first
    return Timing(first - started, decoding, late, gaps(times.values()), time.process_time() - busy)


def gaps(times: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Seconds between neighbours, of all sequences together."""
    return tuple(after - before for row in times for before, after in pairwise(row))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def least_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest run, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of all, 0 to 1, do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


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
