"""What a step costs on the host: ``python tests/host_cost.py``. The model's own time is taken off.

CPU time of one thread, in microseconds a step, of all that is not the engine: scheduling, the KV policy, the engine's
inputs, processors, choice, criteria, commit and deltas. The vocabulary is small, so that it is not arithmetic that is
measured. ``--profile`` prints where it goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from trtllm_core import GenerationSession, KVCacheConfig, Plugins, SamplingConfig, Session
from trtllm_core.batch_input import make_requests
from trtllm_core.config import BuildConfig
from trtllm_core.testing.markov import MarkovExecutable

WAYS: Mapping[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "random_seed": 1},
}
PROMPT, NEW = 8, 64


class Clocked(MarkovExecutable):
    """Takes the time that the model itself needs."""

    seconds = 0.0

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        start = time.thread_time()
        super().execute(inputs, outputs, stream)
        self.seconds += time.thread_time() - start


def steps_of(batch: int, way: str, profile: cProfile.Profile | None) -> list[float]:
    """Host seconds of each step but the prompts' and the last. It is measured from first delta to first delta."""
    build = BuildConfig(max_batch_size=batch, max_input_len=PROMPT, max_seq_len=PROMPT + NEW, tokens_per_block=16)
    engine = Clocked(97, build=build)
    session = GenerationSession(
        None, Session.from_engine(engine), kv_cache=KVCacheConfig(), plugins=Plugins.load(), end_ids=[97]
    )
    sampling = SamplingConfig(max_new_tokens=NEW, end_id=None, **WAYS[way])
    prompts = [[(row + i) % 97 for i in range(PROMPT)] for row in range(batch)]
    requests = make_requests(session, session.lora, prompts, sampling, None, None, False, None, None, None, deltas=True)
    taken = []
    stream = session.decode_stream(requests)
    for number in range(NEW):
        within = profile is not None and 0 < number < NEW - 1
        if within:
            profile.enable()
        start, before = time.thread_time(), engine.seconds
        for _ in range(batch):  # one delta a row
            next(stream)
        taken.append(time.thread_time() - start - engine.seconds + before)
        if within:
            profile.disable()
    return taken[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for way in options.way:
        for batch in options.batch:
            profile = cProfile.Profile() if options.profile else None
            taken = [second for _ in range(options.repeats) for second in steps_of(batch, way, profile)]
            quick = sorted(taken)[len(taken) // 10]
            print(
                f"{way:8} batch {batch:4}: median {statistics.median(taken) * 1e6:7.0f} µs, tenth {quick * 1e6:7.0f} µs"
            )
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
