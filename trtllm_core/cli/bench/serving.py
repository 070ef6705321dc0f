"""Running a trace of requests through an ``Executor``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.timing import median, percentile
from trtllm_core.cli.bench.trace import Trace
from trtllm_core.cli.bench.workloads import random_prompts

if TYPE_CHECKING:
    from trtllm_core.plugin.observer import StepStats
    from trtllm_core.runner import ModelRunner

_STEPS = 1_000_000
"""Steps of which statistics are kept: more than a trace takes."""


@dataclass(frozen=True)
class Served:
    """What one run of a trace came to."""

    seconds: float
    """From the first arrival to the last token."""
    first: tuple[float, ...]
    """Of each request, seconds from its arrival to its first token."""
    gaps: tuple[float, ...]
    """Seconds between a request's tokens, of all requests."""
    tokens: int
    """Generated, of all requests."""
    steps: int = 0
    """0 where nobody counted."""
    rows: float = 0.0
    """Requests that a step ran, on average."""


def serve(runner: ModelRunner, trace: Trace) -> Served:
    """Greedy, to the lengths that the trace says. Requests that come when all places are taken wait for one."""
    from trtllm_core.config import ExecutorConfig, SamplingConfig
    from trtllm_core.executor import Executor

    count = len(trace.requests)
    prompts = random_prompts([one.prompt_len for one in trace.requests], runner.vocab_size)
    sampling = [SamplingConfig(max_new_tokens=one.new_tokens, end_id=()) for one in trace.requests]
    config = ExecutorConfig(max_queue_size=count, request_stats_max_requests=count, iter_stats_max_iterations=_STEPS)
    with Executor(runner, config) as executor:
        start, handles = time.perf_counter(), []
        for prompt, settings, request in zip(prompts, sampling, trace.requests, strict=True):
            ahead = start + request.arrival - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            handles.append(executor.submit(prompt, settings, streaming=False))
        for handle in handles:
            handle.result()
        seconds = time.perf_counter() - start
        requests, steps = executor.get_latest_request_stats(), executor.get_latest_iteration_stats()
    return Served(
        seconds,
        tuple(one.first_token_seconds for one in requests if one.first_token_seconds is not None),
        _gaps(steps),
        sum(one.generated_tokens for one in requests),
        len(steps),
        sum(one.rows for one in steps) / max(len(steps), 1),
    )


def _gaps(steps: Sequence[StepStats]) -> tuple[float, ...]:
    """A request that generates has a token of each step, so that what lies between its tokens is between the steps."""
    return tuple(
        after.timestamp - before.timestamp
        for before, after in pairwise(steps)
        for _ in range(after.generation_requests)
    )


def record(trace: Trace, runs: Sequence[Served]) -> dict[str, Any]:
    """For ``--json``: medians of the runs' rates, and times of all runs together in milliseconds."""
    first = [one for run in runs for one in run.first]
    between = [one for run in runs for one in run.gaps]
    return {
        "requests": len(trace.requests),
        "prompt_tokens": trace.prompt_tokens,
        "new_tokens": trace.new_tokens,
        "arrivals_over_s": trace.spread,
        "output_tokens_per_s": median([run.tokens / run.seconds for run in runs]),
        "requests_per_s": median([len(trace.requests) / run.seconds for run in runs]),
        "first_token_p50_ms": _ms(percentile(first, 0.5)),
        "first_token_p99_ms": _ms(percentile(first, 0.99)),
        "between_p50_ms": _ms(percentile(between, 0.5)),
        "between_p99_ms": _ms(percentile(between, 0.99)),
        "steps": median([run.steps for run in runs]),
        "rows_per_step": median([run.rows for run in runs]),
        "runs": [run.tokens / run.seconds for run in runs],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
