"""Prefixes that are reused, from the user's end: the same tokens as when everything is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine
from trtllm_core.errors import ConfigError
from trtllm_core.outputs import GenerationOutput
from trtllm_core.plugin import hookimpl
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.markov import MarkovExecutable

LIMITS = BuildConfig(max_batch_size=4, max_input_len=100, max_seq_len=128, max_num_tokens=64, tokens_per_block=8)
PREFIX = KVCacheConfig(policy="prefix")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return folder / "engine"


@pytest.fixture
def runner(engine: Path, plugins: Plugins) -> Callable[[KVCacheConfig], ModelRunner]:
    """A batch-invariant runner: tokens and log-probabilities are the same bits, whatever was computed when."""
    return lambda cache: ModelRunner.from_dir(engine, kv_cache=cache, plugins=plugins, batch_invariant=True)


def generate(runner: ModelRunner, prompts: list[list[int]], **fields: Any) -> list[GenerationOutput]:
    given = {"top_k": 0, "top_p": 1.0, "random_seed": 5, "max_new_tokens": 12, "end_id": (), "return_dict": True}
    result = runner.generate(prompts, SamplingConfig(**{**given, **fields}), output_log_probs=True)
    runner.generation.loop.cache.policy.check_integrity()
    return result["outputs"]


def told(outputs: list[GenerationOutput]) -> list[Any]:
    return [(output.tokens, output.log_probs) for output in outputs]


def test_a_conversation_goes_on_where_it_ended(runner: Callable[..., ModelRunner]) -> None:
    plain, reusing = runner(KVCacheConfig()), runner(PREFIX)
    text = [3] * 9 + [4, 5, 6]
    for turn in range(4):
        (ours,), (theirs,) = generate(reusing, [text]), generate(plain, [text])
        assert told([ours]) == told([theirs])
        # The last token of an answer was never run; of what was, full blocks are there.
        assert ours.cached_prompt_tokens == ((len(text) - 2) // 8 * 8 if turn else 0)
        assert theirs.cached_prompt_tokens == 0
        text = [*text, *ours.tokens, 7 + turn]


def test_prompts_of_one_batch_share(runner: Callable[..., ModelRunner]) -> None:
    prompts = [[9] * 41, [9] * 41, [9] * 38 + [1], [2] * 5]
    plain, reusing = runner(KVCacheConfig()), runner(PREFIX)
    outputs = generate(reusing, prompts)
    assert told(outputs) == told(generate(plain, prompts))
    assert [output.cached_prompt_tokens for output in outputs] == [0, 40, 38, 0]
    steps = reusing.generation.loop.steps
    assert steps <= plain.generation.loop.steps + 1, "whoever waits, waits for one step"


def test_random_work_in_a_small_pool(runner: Callable[..., ModelRunner]) -> None:
    rng = random.Random(2)
    plain = runner(KVCacheConfig())
    for options in ({}, {"eviction": "lfu", "partial_blocks": False}, {"wait_for_prefix": False}):
        reusing = runner(KVCacheConfig(policy="prefix", max_tokens=160, options=options))
        reused = 0
        for _ in range(3):
            prompts = [[rng.randrange(2)] * rng.randrange(1, 40) + [rng.randrange(60)] for _ in range(4)]
            outputs = generate(reusing, prompts)
            assert told(outputs) == told(generate(plain, prompts))
            reused += sum(output.cached_prompt_tokens for output in outputs)
        assert reused > 0
        usage = reusing.generation.loop.cache.usage()
        assert usage.free == usage.total > usage.cached > 0


def test_salts_keep_requests_apart(plugins: Plugins) -> None:
    reusing = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, kv_cache=PREFIX)
    prompt = [7] * 30
    generate(reusing, [prompt], cache_salt="mine")
    assert generate(reusing, [prompt], cache_salt="mine")[0].cached_prompt_tokens == 29
    assert generate(reusing, [prompt], cache_salt="yours")[0].cached_prompt_tokens == 0
    assert generate(reusing, [prompt])[0].cached_prompt_tokens == 0


def test_a_salt_is_no_wish_that_a_policy_could_refuse(plugins: Plugins) -> None:
    """Where nothing is shared, nothing is shared with others."""
    plain = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)
    assert generate(plain, [[7] * 30], cache_salt="mine")[0].cached_prompt_tokens == 0


def test_a_priority_needs_an_order_that_looks_at_it(plugins: Plugins) -> None:
    for cache in (KVCacheConfig(), PREFIX, KVCacheConfig(policy="contiguous")):
        blind = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, kv_cache=cache)
        with pytest.raises(ConfigError, match=r"cache_priority=80.*does not look at priorities"):
            generate(blind, [[7] * 30], cache_priority=80)
    cache = KVCacheConfig(policy="prefix", options={"eviction": "priority"}, max_tokens=128)
    looking = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, kv_cache=cache)
    generate(looking, [[7] * 30], cache_priority=80)
    for token in range(20, 30):
        generate(looking, [[token] * 30])
    assert generate(looking, [[7] * 30])[0].cached_prompt_tokens == 29
    assert generate(looking, [[20] * 30])[0].cached_prompt_tokens == 0


def test_what_is_left_early_is_not_kept(plugins: Plugins) -> None:
    reusing = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, kv_cache=PREFIX)
    stream = reusing.generate([[7] * 30], max_new_tokens=20, end_id=(), streaming=True)
    next(stream)
    stream.close()
    usage = reusing.generation.loop.cache.usage()
    assert (usage.free, usage.cached) == (usage.total, 0)


def test_observers_learn_what_was_reused(plugins: Plugins) -> None:
    class Watcher:
        hook_api = "observer>=1.0,<2"

        def __init__(self) -> None:
            self.reused: list[int] = []

        @hookimpl
        def trtllm_on_request_end(self, stats: Any) -> None:
            self.reused.append(stats.cached_prompt_tokens)

    watcher = Watcher()
    reusing = ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load(extra=[watcher]), kv_cache=PREFIX)
    for _ in range(2):
        generate(reusing, [[7] * 30])
    assert watcher.reused == [0, 29]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_what_the_pool_cannot_keep_the_host_does(kind: str, tmp_path: Path, plugins: Plugins) -> None:
    """Conversations in turns, together larger than the pool: the same bits, found as if there were room for all."""
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "e", LIMITS.replace(kv_dtype=kind), plugins=plugins)

    def load(tokens: int, host: int) -> ModelRunner:
        cache = KVCacheConfig(policy="prefix", max_tokens=tokens, options={"host_tokens": host})
        return ModelRunner.from_dir(tmp_path / "e", kv_cache=cache, plugins=plugins, batch_invariant=True)

    roomy, tiered, small = load(2048, 0), load(128, 1024), load(128, 0)
    texts = [[number] * 30 + [7, 8] for number in range(1, 6)]
    found = {"tiered": 0, "small": 0}
    for _ in range(2):
        for number, text in enumerate(texts):
            (expected,), (ours,), (less,) = (generate(one, [text]) for one in (roomy, tiered, small))
            assert told([ours]) == told([expected]) == told([less])
            assert ours.cached_prompt_tokens == expected.cached_prompt_tokens
            found["tiered"] += ours.cached_prompt_tokens
            found["small"] += less.cached_prompt_tokens
            texts[number] = [*text, *expected.tokens]
    assert found["tiered"] > found["small"]
    assert tiered.generation.loop.cache.usage().saved > 0


def test_an_engine_without_room_on_the_host_says_so(plugins: Plugins) -> None:
    cache = KVCacheConfig(policy="prefix", options={"host_tokens": 64})
    engine = MarkovExecutable()
    engine.capabilities = replace(engine.capabilities, kv=engine.capabilities.kv - {"host"})
    with pytest.raises(ConfigError, match="PrefixPolicy needs blocks in the host's memory, which this engine"):
        ModelRunner.from_engine(engine, plugins=plugins, kv_cache=cache)
