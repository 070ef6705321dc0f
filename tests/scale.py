"""What a step costs against the batch, and scheduling against the queue.

    python -m tests.scale

Prints two tables. The first has a model without weights, so that what is left is the host's part of a step: the
scheduler's, and the loop's with a greedy sampler. The second has a loop that does nothing, and 10 to 100,000 requests
that wait; a request ends in each step, so that one starts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.plugin import Hypothesis
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.markov import MarkovExecutable

PLAN: Any = SimpleNamespace(branching=SimpleNamespace(max_branches=1, returns=1), ranked=False)


class Nothing(MarkovExecutable):
    """A model that costs nothing: the same logits for all."""

    def execute(self, inputs: Any, outputs: Any, stream: int) -> None:
        outputs["logits"].copy_(self.table[:1].expand_as(outputs["logits"]))


def step_cost(plugins: Plugins, batch: int, steps: int = 40) -> tuple[float, float]:
    """Seconds of the fastest step, and of the scheduler's part in one: other jobs of the machine only add."""
    build = BuildConfig(max_batch_size=batch, max_input_len=64, max_seq_len=128, max_num_tokens=max(4096, batch))
    runner = ModelRunner.from_engine(Nothing(vocab_size=1000, build=build), plugins=plugins)
    loop = runner.generation.loop
    scheduler, within = Scheduler(loop), [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                within[0] += time.perf_counter() - started

        return call

    for name in ("launch", "land"):
        setattr(loop, name, timed(getattr(loop, name)))
    sampling = SamplingConfig(max_new_tokens=64, end_id=())
    for number in range(batch):
        request = Request(str(number), [1 + number % 900], sampling)
        scheduler.add(request, loop.check(request))
    scheduler.step()
    whole, own = [], []
    for _ in range(steps):
        within[0], started = 0.0, time.perf_counter()
        scheduler.step()
        whole.append(time.perf_counter() - started)
        own.append(whole[-1] - within[0])
    scheduler.close()
    return min(whole), min(own)


class IdleLoop:
    """A loop without a model, of 64 slots: in each step the request that runs longest ends."""

    def __init__(self, slots: int = 64) -> None:
        build = SimpleNamespace(max_num_tokens=4096, max_branches=slots)
        self.session = SimpleNamespace(config=SimpleNamespace(build=build))
        self.plugins = SimpleNamespace(observes_steps=False, on_request_end=lambda stats: None)
        self.branches = SimpleNamespace(
            slots=SimpleNamespace(lengths=np.full(slots, 2), ahead=np.zeros(slots, int), free=slots),
            verifying=set(),
            owners={},
            companions=(),
        )
        self.cache = SimpleNamespace(cached=np.full(slots, 1), plan=SimpleNamespace(evicts=False))
        self._free = list(range(slots))
        self._lives: list[LiveRequest] = []

    def admit(self, request: Request, plan: Any) -> LiveRequest | None:
        if not self._free:
            return None
        live = LiveRequest(request, PLAN, (self._free.pop(),))
        live.running.append(Branch(live, live.slots[0], 0))
        self._lives.append(live)
        self.branches.slots.free -= 1
        return live

    def reserve(self, slots: Any, counts: Any) -> None:
        """There is room."""

    looks_ahead = False

    def launch(self, slots: Any, counts: Any) -> bool:
        return not self._free

    def forget(self) -> None:
        """There is nothing."""

    def land(self, full: bool) -> list[Delta]:
        return self.end(self._lives[0], "length") if full else []

    def end(self, live: LiveRequest, reason: str) -> list[Delta]:
        if live in self._lives:
            self._lives.remove(live)
            live.sequences, live.running = (Hypothesis((1,), reason=reason),), []
            self._free.append(live.slots[0])
            self.branches.slots.free += 1
        return []


def queue_cost(waiting: int, steps: int = 200) -> tuple[float, float]:
    """Median seconds of a step, and of a request's arrival, while so many wait."""
    scheduler = Scheduler(IdleLoop(), priority_seconds=60.0)  # type: ignore[arg-type]
    request = Request("0", (1, 2), SamplingConfig(random_seed=0))
    arrivals, whole = [], []

    def arrive(number: int) -> None:
        deadline = time.monotonic() + 3600 if number % 3 == 0 else None
        started = time.perf_counter()
        scheduler.add(request, PLAN, priority=number % 5, deadline=deadline)
        arrivals.append(time.perf_counter() - started)

    for number in range(waiting + 64):
        arrive(number)
    for number in range(steps):
        arrive(number)
        started = time.perf_counter()
        scheduler.step()
        whole.append(time.perf_counter() - started)
    return statistics.median(whole), statistics.median(arrivals[-steps:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--queues", type=int, nargs="*", default=[10, 100, 1000, 10_000, 100_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    plugins = Plugins.load()
    print("| batch | step, µs | of it scheduling, µs | a sequence, µs |\n|---|---|---|---|")
    for batch in options.batches:
        whole, own = step_cost(plugins, batch)
        print(f"| {batch} | {1e6 * whole:.0f} | {1e6 * own:.0f} | {1e6 * whole / batch:.1f} |")
    print("\n| waiting | scheduling of a step, µs | an arrival, µs |\n|---|---|---|")
    for waiting in options.queues:
        whole, arrival = queue_cost(waiting)
        print(f"| {waiting} | {1e6 * whole:.0f} | {1e6 * arrival:.1f} |")


if __name__ == "__main__":
    main()
