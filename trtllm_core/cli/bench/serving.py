"""Running a trace of requests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.timing import gaps, median, percentile
from trtllm_core.cli.bench.trace import Trace
from trtllm_core.cli.bench.workloads import random_prompts
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.runner import ModelRunner


@dataclass(frozen=True)
class Served:
    """What one run of a trace came to."""

    seconds: float
    """From the first arrival to the last token."""
    first: tuple[float, ...]
    """Of each request, seconds from its arrival to its first token."""
    gaps: tuple[float, ...]
    """Seconds between a request's tokens."""
    tokens: int
    """Generated, of all requests."""


def serve(runner: ModelRunner, trace: Trace) -> Served:
    """Greedy to the lengths that the trace says. Requests beyond the engine's batch wait for a place.

    Raises:
        ConfigError: the trace has arrivals over time, which a static batch cannot take.
    """
    from trtllm_core.config import SamplingConfig

    if trace.spread:
        raise ConfigError("a static batch takes all requests at once: leave --rate out, or write 0 for each arrival")
    prompts = random_prompts([one.prompt_len for one in trace.requests], runner.vocab_size)
    sampling = [SamplingConfig(max_new_tokens=one.new_tokens, end_id=()) for one in trace.requests]
    times: dict[str, list[float]] = {str(i): [] for i in range(len(prompts))}
    tokens = 0
    clock = time.perf_counter
    start = clock()
    for delta in runner.generation.decode_batch(prompts, sampling, streaming=True):
        times[delta.request_id].append(clock())
        tokens += len(delta.tokens)
    seconds = clock() - start
    return Served(seconds, tuple(row[0] - start for row in times.values()), gaps(times.values()), tokens)


def record(trace: Trace, runs: list[Served]) -> dict[str, Any]:
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
        "runs": [run.tokens / run.seconds for run in runs],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
