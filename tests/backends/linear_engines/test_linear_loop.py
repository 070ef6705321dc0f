"""The same loop on the other contract: ONNX Runtime, and TensorRT's double on the bytes that an engine is built of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core import KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine
from trtllm_core.backends.tensorrt.executable import TensorRTExecutable
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.errors import BackendError, ConfigError
from trtllm_core.session import Session
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.host_cuda import HostCuda

from .conftest import LIMITS, MakeGraph

PROMPTS = [[5, 6, 7], [11], list(range(1, 41)), [9, 8], [3] * 17, [42, 17]]
GREEDY = SamplingConfig(max_new_tokens=20, end_id=(), return_dict=True)


@pytest.fixture(scope="module")
def torch_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Session:
    directory = tmp_path_factory.mktemp("torch") / "engine"
    build_engine(checkpoint, directory, LIMITS.replace(dtype="float32"), plugins=plugins)
    return Session.from_directory(directory, plugins=plugins)


@pytest.fixture(scope="module")
def onnx_directory(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    directory = tmp_path_factory.mktemp("onnx") / "engine"
    build_engine(checkpoint, directory, LIMITS.replace(dtype="float32", backend="onnxruntime"), plugins=plugins)
    return directory


def doubled(graph: Any) -> TensorRTExecutable:
    """An engine that the double runs, with the profiles that a build gives it."""
    config: EngineConfig = graph.config
    plan = double.serialise(graph.path, list(profile_shapes(config, TensorRTOptions())))
    return TensorRTExecutable(config, TensorRTRuntime(double, plan, HostCuda()), torch.device("cpu"))


@pytest.fixture(scope="module", params=["onnxruntime", "lower_right", "mask"])
def engine(
    request: pytest.FixtureRequest, onnx_directory: Path, make_graph: MakeGraph, checkpoint: Path, plugins: Plugins
) -> Session:
    if request.param == "onnxruntime":
        return Session.from_directory(onnx_directory, plugins=plugins)
    return Session.from_engine(doubled(make_graph(request.param, "float32", checkpoint)))


def tokens(session: Session, plugins: Plugins, prompts: Any = PROMPTS, **options: Any) -> list[tuple[int, ...]]:
    sampling = options.pop("sampling", GREEDY)
    with ModelRunner.from_engine(session, plugins=plugins, **options) as runner:
        waves = [prompts[at : at + runner.max_batch_size] for at in range(0, len(prompts), runner.max_batch_size)]
        return [output.tokens for wave in waves for output in runner.generate(wave, sampling)["outputs"]]


def test_greedy_equals_the_torch_engine(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    expected = tokens(torch_engine, plugins)
    assert tokens(engine, plugins) == expected


def test_requests_that_wait_for_a_place(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """Rows end at different times and their caches' rows are taken over while the neighbours go on."""
    prompts = PROMPTS[:4]
    wanted = [GREEDY.replace(max_new_tokens=n) for n in (3, 20, 7, 12)]
    with ModelRunner.from_engine(engine, plugins=plugins) as ours, ModelRunner.from_engine(torch_engine) as theirs:
        assert [o.tokens for o in ours.generate(prompts, wanted)["outputs"]] == [
            o.tokens for o in theirs.generate(prompts, wanted)["outputs"]
        ]


def test_sampling_and_stopping(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """Processors, samplers, stop words and log-probabilities see the same logits."""
    sampling = SamplingConfig(
        top_k=0,
        top_p=0.9,
        temperature=0.8,
        repetition_penalty=1.3,
        random_seed=7,
        max_new_tokens=20,
        end_id=(),
        return_dict=True,
        output_log_probs=True,
        stop_words_list=((7,), (30, 31)),
    )
    outputs = []
    for session in (engine, torch_engine):
        with ModelRunner.from_engine(session, plugins=plugins) as runner:
            outputs.append(runner.generate(PROMPTS[:4], sampling)["outputs"])
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours.tokens, ours.finish_reason) == (theirs.tokens, theirs.finish_reason)
        assert np.allclose(ours.log_probs, theirs.log_probs, atol=1e-4)


def test_branches_share_a_prompt_by_copies(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """A fork of linear caches is a copy of their rows."""
    sampling = GREEDY.replace(top_k=0, top_p=1.0, random_seed=3, num_return_sequences=3)
    assert tokens(engine, plugins, PROMPTS[:1], sampling=sampling) == tokens(
        torch_engine, plugins, PROMPTS[:1], sampling=sampling
    )


def test_a_paged_policy_has_whole_rows_for_blocks(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """So forks share a row until one of them is written, and rows that run together may be scattered."""
    config, sampling = KVCacheConfig(policy="paged"), GREEDY.replace(top_k=0, top_p=1.0, random_seed=3)
    sampling = sampling.replace(num_return_sequences=2)
    for wanted in (GREEDY, sampling):
        expected = tokens(torch_engine, plugins, PROMPTS[2:4], sampling=wanted)
        assert tokens(engine, plugins, PROMPTS[2:4], sampling=wanted, kv_cache=config) == expected


def test_a_ring_is_refused(engine: Session, plugins: Plugins) -> None:
    config = KVCacheConfig(policy="paged", options={"max_attention_window": 16})
    with pytest.raises(ConfigError, match="PagedPolicy needs a cyclic cache .* does not offer"):
        ModelRunner.from_engine(engine, plugins=plugins, kv_cache=config)


def test_what_a_run_refuses(engine: Session, plugins: Plugins) -> None:
    with ModelRunner.from_engine(engine, plugins=plugins):
        pass  # allocates the caches
    logits = torch.empty(1, 1, 67)

    def run(write: int = 0, rows: tuple[int, ...] = (0,), ids: int = 2) -> None:
        inputs = {
            "input_ids": torch.zeros(len(rows), ids, dtype=torch.int64),
            "write_indices": torch.full((len(rows),), write),
            "logit_indices": torch.zeros(len(rows), 1, dtype=torch.int64),
            "cache_rows": torch.tensor(rows),
        }
        engine.run(inputs, {"logits": logits.expand(len(rows), 1, 67).contiguous()})

    run()
    with pytest.raises(BackendError, match="outside the cache of 64 entries"):
        run(write=63)
    with pytest.raises(BackendError, match="outside the cache"):
        run(write=-1)
    with pytest.raises(BackendError, match="one after another"):
        run(rows=(0, 2))


def test_limits_of_the_build(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    for changes, message in (
        ({"dtype": "bfloat16"}, "no bfloat16 on the CPU"),
        ({"tp_size": 2}, "one rank"),
        ({"kv_dtype": "float16", "dtype": "float32"}, "leave kv_dtype out"),
        ({"kv_dtype": "int8"}, "backend keeps keys and values in the engine's dtype, float32: leave kv_dtype out"),
    ):
        build = BuildConfig(**{**LIMITS.model_dump(exclude_unset=True), "backend": "onnxruntime", **changes})
        with pytest.raises(ConfigError, match=message):
            build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins)


def test_verify_holds_the_graph_against_the_torch_backend(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    build = LIMITS.replace(dtype="float32", backend="onnxruntime", options={"verify": True})
    found = build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins).record["verified"]
    assert found["dtype"] == "float32"
    assert 0 < found["largest_error"] < 1e-5 * found["largest_logit"]
