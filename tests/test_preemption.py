"""Requests that give their cache back and compute their text anew: the same tokens as those that never had to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.errors import CapacityError
from trtllm_core.loop import StepLoop
from trtllm_core.outputs import GenerationOutput
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion, Stop, hookimpl
from trtllm_core.plugin.kv_policy import OutOfBlocksError
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.markov import MarkovExecutable

LIMITS = BuildConfig(
    max_batch_size=6, max_beam_width=2, max_input_len=60, max_seq_len=96, max_num_tokens=64, tokens_per_block=8
)
PROMPTS = [[5, 6, 7], [11] * 20, [9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42, 17], [11] * 18]
DRAWS = SamplingConfig(
    top_k=0, top_p=0.9, random_seed=5, end_id=(), max_new_tokens=30, output_log_probs=True, return_dict=True
)


class Counts(HostLogitsProcessor):
    """State that follows the text: the more tokens a branch has, the less it likes the first half of the vocabulary."""

    def start(self, view):
        return 0

    def accept(self, state, tokens):
        return state + len(tokens)

    def process(self, state, tokens, logits):
        logits[: len(logits) // 2] -= 0.05 * state


class Enough(HostStoppingCriterion):
    """Ends a branch at its 25th token, by its own count."""

    def start(self, view):
        return 0

    def accept(self, state, tokens):
        return state + len(tokens)

    def check(self, state, tokens, new):
        return Stop("enough", 0) if state == 24 else None


CONFIGS = [
    DRAWS,
    DRAWS.replace(repetition_penalty=1.3, frequency_penalty=0.2, no_repeat_ngram_size=2),
    DRAWS.replace(decoder=use("mirostat")),
    DRAWS.replace(top_p=0.8, top_p_decay=0.9, top_p_min=0.2),
    DRAWS.replace(num_return_sequences=2),
    SamplingConfig(max_new_tokens=30, end_id=(), output_log_probs=True, return_dict=True),
]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return folder / "engine"


@pytest.fixture
def runner(engine: Path, plugins: Plugins) -> Callable[..., ModelRunner]:
    """A batch-invariant runner."""
    return lambda cache=None: ModelRunner.from_dir(engine, kv_cache=cache, plugins=plugins, batch_invariant=True)


def run(runner: ModelRunner, configs: Sequence[SamplingConfig] = CONFIGS) -> list[GenerationOutput]:
    return runner.generate(PROMPTS[: len(configs)], configs, logits_processor=[Counts()], stopping_criteria=[Enough()])[
        "outputs"
    ]


def told(outputs: Sequence[GenerationOutput]) -> list[Any]:
    return [(one.request_id, one.sequence, one.tokens, one.log_probs, one.finish_reason) for one in outputs]


def assert_nothing_is_lost(runner: ModelRunner) -> None:
    loop = runner.generation.loop
    assert loop.branches.slots.free == loop.branches.slots.context.slots
    usage = loop.cache.usage()
    assert usage.free == usage.total
    loop.cache.policy.check_integrity()


@pytest.mark.parametrize("policy", ["paged", "prefix", "contiguous"])
def test_preempted_at_any_time(
    runner: Callable[..., ModelRunner], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own verbs, between any two steps: samplers, penalties, a decoder that learns, two answers."""
    undisturbed = told(run(runner()))
    disturbed = runner(KVCacheConfig(policy=policy))
    rng = random.Random(3)
    reserve = Scheduler._reserve

    def disturb(self):
        for one in [*self._running]:
            if len(self._running) > 1 and rng.random() < 0.1:
                self._running.leave(one)
                self._put_off(one)
        if rng.random() < 0.5:
            self._room.forget()
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    outputs = run(disturbed)
    assert told(outputs) == undisturbed
    assert sum(one.preemptions for one in outputs) > 10
    assert_nothing_is_lost(disturbed)


class Breaks(HostLogitsProcessor):
    """At its 40th row."""

    rows = 0

    def process(self, state, tokens, logits):
        self.rows += 1
        if self.rows == 40:
            raise RuntimeError("enough")


def test_a_plugin_that_fails_ends_those_that_are_put_off(
    runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed, processor = runner(), Breaks()
    reserve, resumed = Scheduler._reserve, StepLoop.resume
    away: list[Any] = []

    def disturb(self):
        if processor.rows >= 30 and not away:
            away.append(self._running.pop())
            self._put_off(away[0])
        return reserve(self)

    def resume(self, live):
        return False if processor.rows < 40 else resumed(self, live)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    monkeypatch.setattr(StepLoop, "resume", resume)
    outputs = disturbed.generate(PROMPTS[:3], DRAWS, logits_processor=[processor])["outputs"]
    assert [output.finish_reason for output in outputs] == ["plugin_error"] * 3
    assert sum(output.preemptions for output in outputs) == 1
    assert_nothing_is_lost(disturbed)


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_optimistic_admission_puts_the_youngest_off(runner: Callable[..., ModelRunner], policy: str) -> None:
    undisturbed = told(run(runner()))
    tight = runner(KVCacheConfig(policy=policy, max_tokens=96, options={"admission": "optimistic"}))
    outputs = run(tight)
    assert told(outputs) == undisturbed
    assert outputs[0].preemptions == 0, "who came first is never put off"
    assert sum(one.preemptions for one in outputs) > 0
    assert_nothing_is_lost(tight)


def test_more_run_at_a_time_than_where_the_worst_is_planned_for(plugins: Plugins) -> None:
    build = LIMITS.replace(max_beam_width=1)
    rows: dict[str, list[int]] = {}

    class Watcher:
        hook_api = "observer>=1.0,<2"

        @hookimpl
        def trtllm_on_step_end(self, stats: Any) -> None:
            rows[admission].append(stats.rows)

        @hookimpl
        def trtllm_on_request_end(self, stats: Any) -> None:
            preempted.append(stats.preemptions)

    loaded = Plugins.load(extra=[Watcher()])
    for admission in ("worst_case", "optimistic"):
        rows[admission], preempted = [], []
        cache = KVCacheConfig(max_tokens=160, options={"admission": admission})
        made = ModelRunner.from_engine(MarkovExecutable(build=build), plugins=loaded, kv_cache=cache)
        ended = made.generate(PROMPTS, max_new_tokens=60, end_id=(), return_dict=True, stop_words_list=[[3]])
        assert len(ended["outputs"]) == 6
    assert sum(rows["optimistic"]) / len(rows["optimistic"]) > sum(rows["worst_case"]) / len(rows["worst_case"])


def test_a_stream_that_is_left_while_somebody_waits(plugins: Plugins) -> None:
    cache = KVCacheConfig(max_tokens=64, options={"admission": "optimistic"})
    made = ModelRunner.from_engine(MarkovExecutable(build=LIMITS), plugins=plugins, kv_cache=cache)
    stream = made.generate(PROMPTS, max_new_tokens=30, end_id=(), streaming=True)
    for _ in range(60):
        next(stream)
    stream.close()
    assert_nothing_is_lost(made)


def test_a_request_that_can_never_run_is_refused(plugins: Plugins) -> None:
    cache = KVCacheConfig(max_tokens=32, options={"admission": "optimistic"})
    made = ModelRunner.from_engine(MarkovExecutable(build=LIMITS), plugins=plugins, kv_cache=cache)
    with pytest.raises(CapacityError, match="need 34 tokens"):
        made.generate([[5] * 4], max_new_tokens=30)


def test_a_policy_that_has_no_room_for_the_only_request(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was admitted: that it runs out alone is the policy's error, and no endless loop."""
    made = ModelRunner.from_engine(MarkovExecutable(build=LIMITS), plugins=plugins)

    def fails(slots, counts):
        raise OutOfBlocksError(1)

    monkeypatch.setattr(made.generation.loop.cache.policy, "extend", fails)
    with pytest.raises(OutOfBlocksError):
        made.generate([[5] * 4], max_new_tokens=3)


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_a_beam_search_and_drafts(
    runner: Callable[..., ModelRunner], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches that were forked compute their texts anew, each for itself."""
    beams = SamplingConfig(
        num_beams=2, repetition_penalty=1.2, end_id=(), max_new_tokens=25, output_log_probs=True, return_dict=True
    )
    configs = [beams, CONFIGS[5].replace(decoder="ngram"), beams.replace(repetition_penalty=1.0)]
    undisturbed = told(run(runner(), configs))
    disturbed = runner(KVCacheConfig(policy=policy))
    rng, reserve = random.Random(4), Scheduler._reserve

    def disturb(self):
        for one in [*self._running]:
            if len(self._running) > 1 and rng.random() < 0.2:
                self._running.leave(one)
                self._put_off(one)
        self._room.forget()
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    outputs = run(disturbed, configs)
    assert told(outputs) == undisturbed
    assert sum(one.preemptions for one in outputs) > 5
    assert_nothing_is_lost(disturbed)
