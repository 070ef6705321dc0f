"""Attention windows and sinks, from the user's end: rings, as options, of a request, and of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core import (
    BuildConfig,
    GenerationSession,
    KVCacheConfig,
    ModelRunner,
    Plugins,
    SamplingConfig,
    Session,
    build_engine,
    use,
)
from trtllm_core.errors import ConfigError
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.markov import MarkovExecutable

LIMITS = BuildConfig(max_batch_size=4, max_input_len=90, max_seq_len=128, max_num_tokens=64, tokens_per_block=8)
PROMPTS = [[5, 6, 7], [11] * 50 + [3], [9, 8] * 20, [1, 2, 3]]
GREEDY = SamplingConfig(max_new_tokens=30, end_id=(), output_log_probs=True, return_dict=True)
WINDOW = 20
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}

Make = Callable[..., ModelRunner]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., Path]:
    """Of the same weights, with and without a sliding window."""
    built: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = str(changes)
        if key not in built:
            folder = tmp_path_factory.mktemp("engine")
            build_engine(write_llama(folder / "hf", **changes), folder / "engine", LIMITS, plugins=plugins)
            built[key] = folder / "engine"
        return built[key]

    return make


@pytest.fixture
def make(engine: Callable[..., Path], plugins: Plugins) -> Make:
    """``make(options of the policy, max_tokens, **fields of config.json)``: a batch-invariant runner."""

    def made(options: dict[str, Any] | None = None, max_tokens: int | None = None, **changes: Any) -> ModelRunner:
        cache = KVCacheConfig(options=options or {}, max_tokens=max_tokens)
        return ModelRunner.from_dir(engine(**changes), kv_cache=cache, plugins=plugins, batch_invariant=True)

    return made


def told(runner: ModelRunner, **fields: Any) -> list[Any]:
    outputs = runner.generate(PROMPTS, GREEDY, **fields)["outputs"]
    usage = runner.generation.loop.cache.usage()
    assert usage.free == usage.total
    return [(output.tokens, output.log_probs) for output in outputs]


def test_a_ring_is_a_sliding_window_in_every_layer(make: Make) -> None:
    """The same weights, once with the window in the model and a cache that keeps everything. Bit for bit."""
    windowed = told(make({"follow_sliding_window": False}, **MISTRAL))
    ring = make({"max_attention_window": WINDOW})
    assert told(ring) == windowed
    assert told(make()) != windowed, "or the test would show nothing"
    assert ring.generation.loop.cache.plan.max_blocks_per_slot == 3


def test_a_model_s_own_window_makes_a_ring(make: Make) -> None:
    keeps = make({"follow_sliding_window": False}, **MISTRAL)
    ring = make(**MISTRAL)
    assert told(ring) == told(keeps)
    assert (ring.generation.loop.cache.plan.window, keeps.generation.loop.cache.plan.window) == (WINDOW + 8, None)
    assert ring.generation.loop.cache.bytes < keeps.generation.loop.cache.bytes / 3


def test_a_window_in_some_layers_alone_makes_none(make: Make) -> None:
    some = make(**MISTRAL, layer_types=["sliding_attention", "full_attention"])
    assert some.generation.loop.cache.plan.window is None
    assert told(some) != told(make(**MISTRAL))


def test_requests_that_wait_and_are_put_off(make: Make) -> None:
    roomy = told(make({"max_attention_window": WINDOW, "sink_token_length": 4}))
    for admission in ("worst_case", "optimistic"):
        options = {"max_attention_window": WINDOW, "sink_token_length": 4, "admission": admission}
        assert told(make(options, max_tokens=48)) == roomy
    assert roomy != told(make({"max_attention_window": WINDOW}))


def test_a_request_asks_for_a_window(make: Make) -> None:
    """As the classic runtime had it: the next batch may have another one."""
    runner = make()
    whole = told(runner)
    ring = told(make({"max_attention_window": WINDOW, "sink_token_length": 4}))
    assert told(runner, max_attention_window_size=WINDOW, sink_token_length=4) == ring != whole
    assert told(runner) == whole
    assert told(runner, max_attention_window_size=LIMITS.max_seq_len) == whole


def test_setup_asks_for_a_window(plugins: Plugins) -> None:
    session = GenerationSession(None, Session(MarkovExecutable()), plugins=plugins)
    session.setup(1, 3, 40, max_attention_window_size=12, sink_token_length=2)
    assert (session.loop.cache.plan.window, session.loop.cache.plan.sink) == (12, 2)
    ids, lengths = torch.tensor([[5, 6, 7]]), torch.tensor([3])
    ring = session.decode(ids, lengths, SamplingConfig(end_id=(), max_new_tokens=40))
    session.setup(1, 3, 40)
    assert session.loop.cache.plan.window is None
    assert torch.equal(session.decode(ids, lengths, SamplingConfig(end_id=(), max_new_tokens=40)), ring)


def test_drafts_in_a_ring(make: Make) -> None:
    """What a model's own ring has room for beyond the window can be taken back; what a user's window hides cannot."""
    ring = make(**MISTRAL)
    plain = told(ring)
    assert told(ring, decoder="ngram") == plain
    config = GREEDY.replace(decoder=use("ngram", tokens=20))
    plan = ring.explain(config)
    assert plan.positions == 9
    assert any("8 drafts a step, because the KV cache takes back no more" in note for note in plan.notes)
    result = ring.generate([[5, 6, 7, 5, 6, 7, 5] * 9], config.replace(max_new_tokens=60))["outputs"][0]
    assert result.tokens == ring.generate([[5, 6, 7, 5, 6, 7, 5] * 9], GREEDY, max_new_tokens=60)["outputs"][0].tokens
    with pytest.raises(ConfigError, match="'ngram' needs 'kv_rewind'"):
        told(ring, decoder="ngram", max_attention_window_size=WINDOW)
    assert told(ring, decoder="ngram") == plain, "the next batch has the model's own ring again"


@pytest.mark.parametrize("policy", ["prefix", "contiguous"])
def test_a_policy_without_windows_refuses(plugins: Plugins, policy: str) -> None:
    runner = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, kv_cache=KVCacheConfig(policy=policy))
    with pytest.raises(ConfigError, match=f"max_attention_window_size=8 .*KV policy '{policy}' has no windows"):
        runner.generate([[1]], max_attention_window_size=8)
    assert runner.session.engine.calls == 0


def test_what_cannot_be_asked_for(plugins: Plugins) -> None:
    runner = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)
    with pytest.raises(ConfigError, match="sink_token_length only means something with max_attention_window"):
        runner.generate([[1]], sink_token_length=4)
    configs = [SamplingConfig(), SamplingConfig(max_attention_window_size=16)]
    with pytest.raises(ConfigError, match="requests of one batch share one cache"):
        runner.generate([[1], [2]], configs)
    stream = runner.generate([[1]], end_id=(), streaming=True)
    next(stream)
    with pytest.raises(ConfigError, match="another batch is still running"):
        runner.generate([[1]], max_attention_window_size=16)
    stream.close()
    runner.generate([[1]], max_attention_window_size=16)
    with pytest.raises(ConfigError, match=r"the KV cache of this session has window 16 and 0 sinks"):
        runner.generation.loop.cache.check_window(8, None)


def test_a_backend_without_rings_refuses_early(plugins: Plugins) -> None:
    model = MarkovExecutable()
    model.capabilities = type(model.capabilities)("packed_paged", ("float32",))
    cache = KVCacheConfig(options={"max_attention_window": 8})
    with pytest.raises(ConfigError, match="PagedPolicy needs a cyclic cache .* backend 'markov' does not offer"):
        ModelRunner.from_engine(model, plugins=plugins, kv_cache=cache)
