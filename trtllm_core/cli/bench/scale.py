"""How a step's cost grows with the batch, and the scheduler's with the queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.timing import median, time_engine
from trtllm_core.cli.bench.workloads import Workload, random_prompts

if TYPE_CHECKING:
    from trtllm_core.runner import ModelRunner

PROMPT_LEN, NEW_TOKENS = 8, 48
"""Short, so that attention does not count for much."""
_WARM, _STEPS = 8, 32


def limits(batches: Sequence[int]) -> dict[str, int]:
    """What an engine needs that is made for this: fields of ``BuildConfig``."""
    batch = max(batches)
    length = PROMPT_LEN + NEW_TOKENS
    return {
        "max_batch_size": batch,
        "max_input_len": PROMPT_LEN,
        "max_seq_len": length,
        "max_num_tokens": max(4096, batch * PROMPT_LEN),
    }


def step_costs(runner: ModelRunner, batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """For each batch size, milliseconds of a decode step: the median over the steps of all runs but the first."""
    found = []
    for batch in batches:
        work = Workload(f"batch {batch}", batch, PROMPT_LEN, NEW_TOKENS)
        runs = [time_engine(runner, work) for _ in range(repeats + 1)][1:]
        step = median([gap for run in runs for gap in run.gaps])
        assert step is not None
        found.append({"batch": batch, "step_ms": 1000 * step, "us_per_row": 1e6 * step / batch})
    return found


def queue_costs(runner: ModelRunner, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of waiting requests, milliseconds of a step of a full batch, and microseconds of an arrival.

    The model runs in each step, so that what grows with the queue is the scheduler's.
    """
    runner.generation.lend("bench measures its scheduler")
    try:
        return [_queue_cost(runner, length) for length in lengths]
    finally:
        runner.generation.take_back()


def _queue_cost(runner: ModelRunner, length: int) -> dict[str, Any]:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.decoding.request import Request
    from trtllm_core.scheduling import Scheduler

    loop = runner.generation.loop
    scheduler, slots = Scheduler(loop), runner.config.build.max_batch_size
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, end_id=())
    clock = time.perf_counter
    try:
        requests = [
            Request(f"running {i}", prompt, sampling)
            for i, prompt in enumerate(random_prompts([PROMPT_LEN] * slots, runner.vocab_size))
        ]
        for request in requests:
            scheduler.add(request, loop.check(request))
        for _ in range(_WARM):  # until all of them generate
            scheduler.step()
        waiting = [replace(requests[0], request_id=f"waiting {i}") for i in range(length)]
        plan = loop.check(waiting[0])  # none of them starts, so that one plan stands for all
        start = clock()
        for request in waiting:
            scheduler.add(request, plan)
        arrival = (clock() - start) / length
        assert scheduler.waiting == length
        steps = []
        for _ in range(_STEPS):
            start = clock()
            scheduler.step()
            steps.append(clock() - start)
        assert scheduler.waiting == length
    finally:
        scheduler.close()
    step = median(steps)
    assert step is not None
    return {"waiting": length, "step_ms": 1000 * step, "arrival_us": 1e6 * arrival}
