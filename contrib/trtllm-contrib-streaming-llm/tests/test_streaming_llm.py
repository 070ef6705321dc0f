"""StreamingLLM: the kit, and a tiny LLaMA against one that is computed anew for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_contrib_streaming_llm.policy import StreamingPolicy
from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, build_engine
from trtllm_core.errors import ConfigError
from trtllm_core.testing import KVPolicyConformance
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.markov import MarkovExecutable


class TestStreaming(KVPolicyConformance):
    plugin = "streaming_llm"
    params = ({"max_attention_window": 10, "sink_token_length": 3},)
    wrong_params = ({"max_attention_window": 4},)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    limits = BuildConfig(max_batch_size=2, max_input_len=90, max_seq_len=128, tokens_per_block=8)
    build_engine(write_llama(folder / "hf", num_hidden_layers=1), folder / "engine", limits)
    return folder / "engine"


def generate(engine: Path, prompts: list[list[int]], new: int, cache: KVCacheConfig | None = None) -> list[Any]:
    runner = ModelRunner.from_dir(engine, kv_cache=cache, batch_invariant=True)
    outputs = runner.generate(prompts, max_new_tokens=new, end_id=(), return_dict=True)["outputs"]
    return [list(output.tokens) for output in outputs]


def test_of_one_layer_the_cache_is_the_text(engine: Path) -> None:
    """Keys of the first layer depend on their own token alone: what a ring holds is what its tokens would be, put one
    behind the other as a text."""
    window, sinks = 20, 4
    cache = KVCacheConfig(policy="streaming_llm", options={"max_attention_window": window, "sink_token_length": sinks})
    prompts = [[5, 6, 7], [(7 * i) % 60 for i in range(50)]]
    for prompt, tokens in zip(prompts, generate(engine, prompts, 40, cache), strict=True):
        text = list(prompt)
        for token in tokens:
            held = text if len(text) <= window else [*text[:sinks], *text[-(window - sinks) :]]
            assert generate(engine, [held], 1) == [[token]]
            text.append(token)


def test_it_is_refused_where_positions_are_not_there() -> None:
    assert StreamingPolicy().options.sink_token_length == 4
    cache = KVCacheConfig(policy="streaming_llm", options={"max_attention_window": 16})
    with pytest.raises(ConfigError, match="StreamingPolicy needs positions within the cache"):
        ModelRunner.from_engine(MarkovExecutable(), kv_cache=cache)
