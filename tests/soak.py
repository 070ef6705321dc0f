"""Many requests of all kinds through an ``Executor`` whose KV pool is far too small for them.

    python -m tests.soak --requests 20000

Every request must end with the right reason and the tokens that it gets alone, and the pool must end empty. Requests
are drawn from a set of kinds, so that what each gets alone is computed once; who runs beside whom is left to chance.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from trtllm_core import (
    BuildConfig,
    Executor,
    ExecutorConfig,
    KVCacheConfig,
    ModelRunner,
    Plugins,
    RequestHandle,
    SamplingConfig,
    build_engine,
    use,
)
from trtllm_core.errors import ConfigError
from trtllm_core.outputs import GenerationOutput
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion, Stop
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(
    max_batch_size=16, max_beam_width=2, max_input_len=48, max_seq_len=80, max_num_tokens=64, tokens_per_block=8
)
VOCABULARY = 60
BASE = SamplingConfig(end_id=(), return_dict=True)
DRAWS = BASE.replace(top_k=0, top_p=0.95)
WISHES: dict[str, SamplingConfig] = {
    "greedy": BASE,
    "greedy until an end": BASE.replace(end_id=(7, 11, 19, 23)),
    "penalties": BASE.replace(repetition_penalty=1.3, frequency_penalty=0.2, no_repeat_ngram_size=2),
    "top-p": DRAWS,
    "top-k, warm": DRAWS.replace(top_k=9, temperature=1.4),
    "stop words": DRAWS.replace(stop_words_list=[[3], [8, 9], [14], [30], [31], [41]]),
    "bad words, minimum": DRAWS.replace(bad_words_list=[[5], [6, 7]], min_length=4, end_id=(1, 2, 9)),
    "mirostat": DRAWS.replace(decoder=use("mirostat")),
    "two answers": DRAWS.replace(num_return_sequences=2),
    "two beams": BASE.replace(num_beams=2, end_id=(4, 12, 33)),
    "drafts": BASE.replace(decoder="ngram"),
    "hf": DRAWS.replace(preset="hf", top_k=20, top_p=0.8),
}
FATES = ("runs",) * 80 + ("cancelled",) * 8 + ("late",) * 6 + ("fails",) * 4 + ("refused",) * 2


class Counts(HostLogitsProcessor):
    """State that follows the text."""

    def start(self, view: Any) -> int:
        return 0

    def accept(self, state: int, tokens: Sequence[int]) -> int:
        return state + len(tokens)

    def process(self, state: int, tokens: Sequence[int], logits: Any) -> None:
        logits[: len(logits) // 2] -= 0.05 * state


class Fails(Counts):
    """Raises at its ``at``-th token; in the place that ``where`` says."""

    def __init__(self, where: str, at: int) -> None:
        self.where, self.at = where, at

    def start(self, view: Any) -> int:
        if self.where == "start":
            raise ZeroDivisionError("as planned")
        if self.where == "refuses":
            raise ConfigError("as planned")
        return 0

    def accept(self, state: int, tokens: Sequence[int]) -> int:
        if self.where == "accept" and state + len(tokens) >= self.at:
            raise ZeroDivisionError("as planned")
        return state + len(tokens)

    def process(self, state: int, tokens: Sequence[int], logits: Any) -> None:
        if self.where == "process" and state >= self.at:
            raise ZeroDivisionError("as planned")


class FailsToStop(HostStoppingCriterion):
    """A criterion that raises at the third token."""

    def start(self, view: Any) -> int:
        return 0

    def accept(self, state: int, tokens: Sequence[int]) -> int:
        return state + len(tokens)

    def check(self, state: int, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        if state + len(new) >= 3:
            raise ZeroDivisionError("as planned")
        return None


@dataclass
class Kind:
    """A request that is made again and again."""

    name: str
    prompt: list[int]
    config: SamplingConfig
    fate: str
    plugins: Callable[[], dict[str, Any]]
    """Fresh plugin objects, as arguments of ``submit``."""
    fails_first: bool = False
    """Whether a plugin fails before it has a token."""
    alone: list[GenerationOutput] = field(default_factory=list)
    """What it comes to alone, where tokens are compared."""

    @property
    def sequences(self) -> int:
        """How many it returns."""
        return max(self.config.num_return_sequences, self.config.num_beams)


def draw_kind(rng: random.Random, look_ahead: bool) -> Kind:
    """One of all kinds; of those that let steps look ahead, where that is to be tried."""
    wishes = [name for name in WISHES if not look_ahead or name not in ("two beams", "drafts")]
    name, fate = rng.choice(wishes), rng.choice(FATES)
    config = WISHES[name].replace(max_new_tokens=rng.randrange(1, 32), random_seed=rng.randrange(1 << 30))
    shared = [9] * 24 if rng.random() < 0.2 else []
    prompt = shared + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 48 - len(shared)))]
    make: Callable[[], dict[str, Any]] = dict
    fails_first = False
    if fate == "fails":
        where, at = rng.choice(["start", "accept", "process", "stop"]), rng.randrange(1, 8)
        where = "stop" if look_ahead else where
        fails_first = where == "start"
        if where == "stop":
            make = lambda: {"stopping_criteria": FailsToStop()}  # noqa: E731
        else:
            make = lambda: {"logits_processor": Fails(where, at)}  # noqa: E731
    elif fate == "refused":
        make = lambda: {"logits_processor": Fails("refuses", 0)}  # noqa: E731
    elif rng.random() < 0.2 and not look_ahead:
        make = lambda: {"logits_processor": Counts()}  # noqa: E731
    return Kind(name, prompt, config, fate, make, fails_first)


def check(kind: Kind, outputs: Sequence[GenerationOutput], exact: bool) -> str:
    """Hold a result against what the request gets alone; its reason alone, where not ``exact``. Returns the reason."""
    reasons = {one.finish_reason for one in outputs}
    cut = reasons & {"cancelled", "timed_out"}
    allowed = {"cancelled": {"cancelled"}, "late": {"timed_out"}}.get(kind.fate, set())
    assert cut <= allowed, f"{kind.name}: ended as {reasons}, but nobody asked for it"
    assert len(outputs) == kind.sequences, f"{kind.name}: {len(outputs)} sequences"
    for one, alone in zip(outputs, kind.alone if exact else (), strict=exact):
        if one.finish_reason in cut:
            searched = kind.config.num_beams > 1
            assert searched or one.tokens == alone.tokens[: len(one.tokens)], f"{kind.name}: other tokens, cut"
        elif not cut or kind.config.num_beams == 1:
            told = one.tokens, one.finish_reason, one.error
            assert told[:2] == (alone.tokens, alone.finish_reason), f"{kind.name}: {told}, alone {alone}"
    if kind.fails_first:
        assert reasons == {"plugin_error"}
    assert exact or kind.fate == "fails" or "plugin_error" not in reasons
    return "+".join(sorted(reasons))


@dataclass
class Soak:
    """What a run did."""

    reasons: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    steps: int = 0
    seconds: float = 0.0
    most_waiting: int = 0
    resident: list[int] = field(default_factory=list)
    """Bytes at each tenth of the run."""

    def lines(self) -> list[str]:
        sizes = ", ".join(f"{size / 2**20:.0f}" for size in self.resident)
        return [
            f"ended: {dict(sorted(self.reasons.items()))}",
            f"{self.steps} steps in {self.seconds:.0f} s, {self.preemptions} preemptions, {self.most_waiting} waited",
            f"resident MiB at each tenth: {sizes}",
        ]


def build(folder: Path, plugins: Plugins) -> Path:
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return folder / "engine"


def soak(
    engine: Path,
    plugins: Plugins,
    requests: int,
    seed: int = 0,
    policy: str = "prefix",
    kinds: int = 400,
    device: str = "cpu",
    look_ahead: bool = False,
) -> Soak:
    """Run them, and raise ``AssertionError`` where something is wrong."""
    rng, exact = random.Random(seed), device == "cpu"
    where: dict[str, Any] = {"batch_invariant": True} if exact else {"device": device}
    drawn = [draw_kind(rng, look_ahead) for _ in range(min(kinds, requests))]
    if exact:
        reference = ModelRunner.from_dir(engine, plugins=plugins, **where)
        for kind in drawn:
            if kind.fate != "refused":
                kind.alone = reference.generate([kind.prompt], kind.config, **kind.plugins())["outputs"]
    tokens = LIMITS.max_branches * LIMITS.max_seq_len // 10
    cache = KVCacheConfig(policy=policy, max_tokens=tokens, options={"admission": "optimistic"})
    runner = ModelRunner.from_dir(engine, plugins=plugins, kv_cache=cache, look_ahead=look_ahead or not exact, **where)
    done, process, started = Soak(), psutil.Process(), time.perf_counter()
    with Executor(runner, ExecutorConfig(max_queue_size=200)) as executor, Coroutines() as coroutines:
        open_: deque[tuple[Kind, RequestHandle, Any]] = deque()
        for number in range(requests):
            while executor.waiting >= 100:
                done.reasons[settle(*open_.popleft(), exact)] += 1
            open_.append(submit(executor, coroutines, rng.choice(drawn), rng))
            done.most_waiting = max(done.most_waiting, executor.waiting)
            if (number + 1) % max(requests // 10, 1) == 0:
                gc.collect()
                done.resident.append(process.memory_info().rss)
                done.preemptions += sum(one.preemptions for one in executor.get_latest_iteration_stats())
        while open_:
            done.reasons[settle(*open_.popleft(), exact)] += 1
    done.preemptions += sum(one.preemptions for one in executor.get_latest_iteration_stats())
    loop = runner.generation.loop
    done.steps, done.seconds = loop.steps, time.perf_counter() - started
    usage = loop.cache.usage()
    assert usage.free == usage.total, f"{usage.total - usage.free} blocks are still held"
    assert loop.branches.slots.free == loop.branches.slots.context.slots, "a slot is still held"
    assert not {**loop.branches.live, **loop.branches.owners}
    assert executor._worker.idle, "the executor still holds a request"
    assert not any(stages.live or stages._of for stages in loop.branches.stages)
    loop.cache.policy.check_integrity()
    assert sum(done.reasons.values()) == requests
    grown = done.resident[-1] - done.resident[len(done.resident) // 4]
    assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB more are resident than after a quarter of the run"
    return done


class Coroutines:
    """A thread with an asyncio loop, in which some of the requests are read."""

    def __enter__(self) -> Coroutines:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def read(handle: RequestHandle) -> dict[int, list[int]]:
    """The sequences as the deltas tell them."""
    texts: dict[int, list[int]] = {}
    async for delta in handle:
        text = texts.setdefault(delta.sequence, [])
        if delta.keep is not None:
            del text[delta.keep :]
        text += delta.tokens
    return texts


def submit(
    executor: Executor, coroutines: Coroutines, kind: Kind, rng: random.Random
) -> tuple[Kind, RequestHandle, Any]:
    deadline = rng.random() * 0.5 if kind.fate == "late" else None
    streaming, priority = rng.random() < 0.5, rng.randrange(3)
    handle = executor.submit(
        kind.prompt, kind.config, streaming=streaming, priority=priority, deadline=deadline, **kind.plugins()
    )
    reading = None
    if streaming:
        reading = asyncio.run_coroutine_threadsafe(read(handle), coroutines.loop)
    if kind.fate == "cancelled":
        threading.Timer(rng.random() * 0.5, handle.cancel).start()
    return kind, handle, reading


def settle(kind: Kind, handle: RequestHandle, reading: Any, exact: bool) -> str:
    """Wait for a request and check it."""
    try:
        outputs = handle.result(300)
    except ConfigError as error:
        if kind.fate != "refused" or not (reading is None or isinstance(reading.exception(60), ConfigError)):
            raise AssertionError(f"{kind.name}: {error}") from error
        return "refused"
    reason = check(kind, outputs, exact)
    if reading is not None:
        texts = reading.result(60)
        told = [tuple(texts.get(one.sequence, ())) for one in outputs]
        assert told == [tuple(one.tokens) for one in outputs], f"{kind.name}: deltas tell other tokens than the result"
    return reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="prefix", choices=["paged", "prefix"])
    parser.add_argument("--kinds", type=int, default=1000, help="different requests; each is run alone once")
    parser.add_argument("--device", default="cpu", help="elsewhere than on the CPU, tokens are not compared")
    parser.add_argument("--look-ahead", action="store_true", help="only requests that let steps look ahead")
    options = parser.parse_args()
    plugins = Plugins.load()
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder), plugins)
        done = soak(
            engine,
            plugins,
            options.requests,
            options.seed,
            options.policy,
            options.kinds,
            options.device,
            options.look_ahead,
        )
    print("\n".join(done.lines()))


if __name__ == "__main__":
    main()
