"""Generations whose keys and values are codes: the same tokens whatever runs beside them, in less room."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.errors import ConfigError
from trtllm_core.outputs import GenerationOutput
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(
    max_batch_size=8, max_beam_width=3, max_input_len=60, max_seq_len=96, max_num_tokens=64, tokens_per_block=8
)
KINDS = ["fp8", "int8"]
PROMPTS = [
    [5, 6, 7],
    [11] * 20,
    [9, 8],
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
    [42, 17],
    [3] * 31,
    [(7 * i) % 60 for i in range(50)],
]
DRAWS = SamplingConfig(
    top_k=0, top_p=0.9, random_seed=5, end_id=(), max_new_tokens=16, output_log_probs=True, return_dict=True
)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    write_llama(folder / "hf")
    for kind in ("float32", *KINDS):
        build_engine(folder / "hf", folder / kind, LIMITS.replace(kv_dtype=kind), plugins=plugins)
    return {kind: folder / kind for kind in ("float32", *KINDS)}


@pytest.fixture(scope="module")
def runner(engines: dict[str, Path], plugins: Plugins) -> Callable[..., ModelRunner]:
    def load(kind: str, cache: KVCacheConfig | None = None, **options: Any) -> ModelRunner:
        return ModelRunner.from_dir(
            engines[kind], kv_cache=cache, plugins=plugins, **{"batch_invariant": True, **options}
        )

    return load


def generate(runner: ModelRunner, prompts: list[list[int]], config: SamplingConfig = DRAWS) -> list[GenerationOutput]:
    outputs = runner.generate(prompts, config)["outputs"]
    runner.generation.loop.cache.policy.check_integrity()
    return list(outputs)


def told(outputs: list[GenerationOutput]) -> list[Any]:
    return [(output.tokens, output.log_probs) for output in outputs]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(kind: str, runner: Callable[..., ModelRunner]) -> list[Any]:
    """Each request by itself."""
    one = runner(kind)
    return [told(generate(one, [prompt]))[0] for prompt in PROMPTS]


def test_in_a_batch(kind: str, alone: list[Any], runner: Callable[..., ModelRunner]) -> None:
    """With other requests in chunks beside them: a step runs 64 tokens, the prompts have more."""
    assert told(generate(runner(kind), PROMPTS)) == alone
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    assert told(generate(runner(kind), [PROMPTS[i] for i in order])) == [alone[i] for i in order]


def test_the_codes_show(kind: str, alone: list[Any], runner: Callable[..., ModelRunner]) -> None:
    """Log-probabilities are others than without codes, and not by much."""
    exact = told(generate(runner("float32"), PROMPTS))
    first = [(ours[1][0], theirs[1][0]) for ours, theirs in zip(alone, exact, strict=True)]
    assert any(ours != theirs for ours, theirs in first)
    assert max(abs(ours - theirs) for ours, theirs in first) < 0.1


def test_after_giving_its_cache_back(
    kind: str, alone: list[Any], runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed token by token is computed again in one piece."""
    reserve, steps = Scheduler._reserve, iter(range(10_000))

    def disturb(self: Scheduler) -> Any:
        step = next(steps)
        for number, one in enumerate([*self._running]):
            if (step + number) % 5 == 4 and len(self._running) > 1:
                self._running.leave(one)
                self._put_off(one)
        self._room.forget()
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    outputs = generate(runner(kind), PROMPTS)
    assert told(outputs) == alone
    assert min(output.preemptions for output in outputs) >= 2


def test_prefixes_are_reused(kind: str, alone: list[Any], runner: Callable[..., ModelRunner]) -> None:
    reusing = runner(kind, KVCacheConfig(policy="prefix"))
    generate(reusing, PROMPTS)
    again = generate(reusing, PROMPTS)
    assert told(again) == alone
    assert again[-1].cached_prompt_tokens == 48


def test_beams_share_and_copy_blocks(kind: str, runner: Callable[..., ModelRunner]) -> None:
    search = SamplingConfig(
        num_beams=3, max_new_tokens=12, end_id=(), output_log_probs=True, return_dict=True, output_cum_log_probs=True
    )
    one = runner(kind)
    expected = [told(generate(one, [prompt], search)) for prompt in PROMPTS[:2]]
    both = told(generate(one, PROMPTS[:2], search))
    assert [both[:3], both[3:]] == expected


@pytest.mark.parametrize(
    "cache",
    [
        KVCacheConfig(options={"max_attention_window": 24, "sink_token_length": 4}),
        KVCacheConfig(policy="streaming_llm", options={"max_attention_window": 24, "sink_token_length": 4}),
    ],
    ids=["ring", "streaming"],
)
def test_rings(cache: KVCacheConfig, kind: str, runner: Callable[..., ModelRunner]) -> None:
    one = runner(kind, cache)
    expected = [told(generate(one, [prompt]))[0] for prompt in PROMPTS]
    assert told(generate(one, PROMPTS)) == expected


def test_entries_are_moved(kind: str, runner: Callable[..., ModelRunner]) -> None:
    """By a policy that looks at attention: those over codes are much as those over numbers."""
    cache = KVCacheConfig(policy="h2o", options={"heavy": 20, "recent": 12})
    found = {one: generate(runner(one, cache, batch_invariant=False), PROMPTS[5:]) for one in (kind, "float32")}
    for ours, theirs in zip(found[kind], found["float32"], strict=True):
        assert abs(ours.log_probs[0] - theirs.log_probs[0]) < 0.1
        assert len(ours.tokens) == 16


def test_compiled_and_plain_kernels_agree(kind: str, runner: Callable[..., ModelRunner]) -> None:
    greedy = DRAWS.replace(top_k=1)
    expected = generate(runner(kind), PROMPTS, greedy)
    for native in (False, None):
        found = generate(runner(kind, batch_invariant=False, native=native), PROMPTS, greedy)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.log_probs[0] == pytest.approx(theirs.log_probs[0], abs=1e-3)


def test_drafts_are_taken_back(kind: str, alone: list[Any], runner: Callable[..., ModelRunner]) -> None:
    config = DRAWS.replace(top_k=1, decoder=use("ngram"))
    plain = generate(runner(kind), PROMPTS, DRAWS.replace(top_k=1))
    assert [one.tokens for one in generate(runner(kind), PROMPTS, config)] == [one.tokens for one in plain]


def test_room(engines: dict[str, Path], kind: str, runner: Callable[..., ModelRunner]) -> None:
    """Bytes of a token are codes and scales, in the plan as in the pool."""
    one = runner(kind)
    model, cache = one.config.model, one.generation.loop.cache
    per_token = 2 * model.num_layers * model.num_kv_heads * (model.head_size + 4)
    assert one.config.model.kv_bytes_per_token(kind) == per_token
    assert cache.bytes == cache.plan.bytes == cache.plan.num_blocks * 8 * per_token
    assert cache.bytes < 0.4 * runner("float32").generation.loop.cache.bytes
    assert json.loads((engines[kind] / "config.json").read_text())["build"]["kv_dtype"] == kind


def test_refusals(tmp_path: Path, plugins: Plugins, runner: Callable[..., ModelRunner]) -> None:
    with pytest.raises(ConfigError, match="kv_dtype"):
        BuildConfig(kv_dtype="int4")
    with pytest.raises(
        ConfigError, match="fp8, int8 codes, or in the engine's dtype, float32: leave kv_dtype='float16'"
    ):
        build_engine(write_llama(tmp_path / "hf"), tmp_path / "e", LIMITS.replace(kv_dtype="float16"), plugins=plugins)
    config = runner("int8").config
    odd = config.replace(model=config.model.replace(head_size=7))
    with pytest.raises(ConfigError, match="int8 keys and values need heads of an even size"):
        TorchBackend().build(odd, plugins.model_families.get("llama").load(), [], tmp_path, 0, lambda *_: None)


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    "cache",
    [
        KVCacheConfig(),
        KVCacheConfig(policy="prefix"),
        KVCacheConfig(options={"max_attention_window": 24, "sink_token_length": 4}),
    ],
    ids=["paged", "prefix", "ring"],
)
def test_cuda(cache: KVCacheConfig, graphs: bool, kind: str, runner: Callable[..., ModelRunner]) -> None:
    """As on the CPU, but for codes that rounding decides otherwise."""
    greedy = DRAWS.replace(top_k=1)
    expected = generate(runner(kind, cache), PROMPTS, greedy)
    one = runner(kind, cache, batch_invariant=False, device="cuda", cuda_graphs=graphs)
    for _ in range(2):  # the second time, from what is kept
        for ours, theirs in zip(generate(one, PROMPTS, greedy), expected, strict=True):
            assert ours.log_probs[:3] == pytest.approx(theirs.log_probs[:3], abs=2e-2)
