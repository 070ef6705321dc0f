"""Contexts, memory, streams, graphs and caches of a TensorRT engine: the double in TensorRT's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig, Session
from trtllm_core.backends.tensorrt.contexts import Contexts
from trtllm_core.backends.tensorrt.executable import TensorRTExecutable
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import CONTEXT, GENERATION, profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.errors import ConfigError
from trtllm_core.pointers import Pointer
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.host_cuda import HostCuda

from .conftest import Graph, MakeGraph

GREEDY = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)
PROMPTS = [[5, 6, 7, 8, 9], [11] * 4, [9, 8] * 3]
"""All longer than what the generation profile takes."""


@pytest.fixture
def graph(make_graph: MakeGraph) -> Graph:
    return make_graph("lower_right", "float32")


@pytest.fixture
def plain_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double as the module ``tensorrt``: it neither captures by itself nor keeps kernels."""
    monkeypatch.delattr(double.RuntimeConfig, "cuda_graph_strategy")
    monkeypatch.delattr(double.RuntimeConfig, "create_runtime_cache")


def load(graph: Graph, cuda: HostCuda | None = None, streamable: int = 0, **options: Any) -> TensorRTRuntime:
    profiles = list(profile_shapes(graph.config, TensorRTOptions(max_draft_len=2)))
    plan = double.serialise(graph.path, profiles, streamable=streamable)
    return TensorRTRuntime(double, plan, cuda or HostCuda(), **options)


def session_of(graph: Graph, runtime: TensorRTRuntime) -> Session:
    return Session.from_engine(TensorRTExecutable(graph.config, runtime, torch.device("cpu")))


def tokens(session: Session, plugins: Plugins) -> list[tuple[int, ...]]:
    with ModelRunner.from_engine(session, plugins=plugins) as runner:
        return [one.tokens for one in runner.generate(PROMPTS, GREEDY)["outputs"]]


def step(graph: Graph, tokens: int = 1, rows: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of a run over empty caches."""
    model, build = graph.config.model, graph.config.build
    shape = (rows, model.num_kv_heads, build.max_seq_len, model.head_size)
    inputs = {
        "input_ids": torch.arange(1, rows * tokens + 1).view(rows, tokens),
        "write_indices": torch.zeros(rows, dtype=torch.int64),
        "logit_indices": torch.zeros(rows, 1, dtype=torch.int64),
    }
    for layer in range(model.num_layers):
        inputs |= {f"past_{what}_{layer}": torch.zeros(shape) for what in ("key", "value")}
    return inputs, {"logits": torch.empty(rows, 1, graph.config.vocab_size_padded)}


def test_each_profile_has_a_context_in_the_same_memory(graph: Graph, plugins: Plugins) -> None:
    runtime = load(graph)
    tokens(session_of(graph, runtime), plugins)
    contexts = runtime.engine.contexts
    assert {context.profile for context in contexts} == {CONTEXT, GENERATION}
    first, second = (context._memory for context in contexts)
    assert first == second
    assert first[1] == runtime.engine.device_memory_size_v2


@pytest.mark.parametrize(("count", "profile"), [(1, GENERATION), (3, GENERATION), (4, CONTEXT), (48, CONTEXT)])
def test_the_tightest_profile_that_fits(count: int, profile: int, graph: Graph) -> None:
    inputs, _ = step(graph, count)
    assert load(graph).profile_for({name: tuple(one.shape) for name, one in inputs.items()}) == profile


def test_no_profile_fits(graph: Graph) -> None:
    inputs, outputs = step(graph, 49)
    with pytest.raises(ConfigError, match=r"no profile of the engine admits input_ids \[2, 49\]"):
        load(graph).run(inputs, outputs, 0)


def test_another_stream_waits_for_the_last(graph: Graph) -> None:
    runtime = load(graph)
    inputs, outputs = step(graph)
    runtime.run(inputs, outputs, 3)
    first = outputs["logits"].clone()
    runtime.run(inputs, outputs, 4)  # the double refuses memory that another stream may still use
    assert torch.equal(outputs["logits"], first)
    unordered = HostCuda()
    unordered.wait = lambda stream, before: None  # type: ignore[method-assign]
    runtime = load(graph, unordered)
    runtime.run(inputs, outputs, 3)
    with pytest.raises(AssertionError, match="does not wait for it"):
        runtime.run(inputs, outputs, 4)


def test_the_double_refuses_what_tensorrt_would(graph: Graph) -> None:
    engine = load(graph).engine
    contexts = Contexts(double, engine, HostCuda())
    contexts._block = lambda: HostCuda().allocate(128)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="too little device memory"):
        contexts.get(CONTEXT, 0)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(double.ExecutionContextAllocationStrategy.USER_MANAGED)
    with pytest.raises(AssertionError, match="has none"):
        engine.create_execution_context(config).execute_async_v3(0)


@pytest.mark.usefixtures("plain_module")
def test_generation_runs_are_captured(graph: Graph, plugins: Plugins) -> None:
    cuda = HostCuda()
    runtime = load(graph, cuda, cuda_graph=True)
    found = tokens(session_of(graph, runtime), plugins)
    assert found == tokens(session_of(graph, load(graph)), plugins)
    assert runtime.graphs is not None
    assert len(runtime.graphs) == 1  # one shape, one place of the caches
    assert cuda.launches == GREEDY.max_new_tokens - 2  # the first token is the context's, the second was captured


@pytest.mark.usefixtures("plain_module")
def test_a_graph_is_of_its_shapes_and_places(graph: Graph) -> None:
    cuda = HostCuda()
    runtime = load(graph, cuda, cuda_graph=True)
    inputs, outputs = step(graph)
    other, _ = step(graph)
    for given in (inputs, other, inputs, other):
        given["input_ids"] = given["input_ids"] + 1  # a new tensor, as each step has
        runtime.run(given, outputs, 0)
        due = outputs["logits"].clone()
        load(graph).run(given, outputs, 0)
        assert torch.equal(outputs["logits"], due)
    wide, wide_outputs = step(graph, rows=3)
    runtime.run(wide, wide_outputs, 0)
    assert runtime.graphs is not None
    assert (len(runtime.graphs), cuda.launches) == (3, 2)


def test_tensorrt_rtx_captures_by_itself(graph: Graph, plugins: Plugins) -> None:
    runtime = load(graph, cuda_graph=True)
    assert runtime.graphs is None
    tokens(session_of(graph, runtime), plugins)
    strategies = {context.profile: context.config.cuda_graph_strategy for context in runtime.engine.contexts}
    assert strategies == {
        CONTEXT: double.CudaGraphStrategy.DISABLED,
        GENERATION: double.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,
    }


def test_kernels_are_kept_beside_the_engine(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank0.cache"
    runtime = load(graph, cache=path)
    inputs, outputs = step(graph)
    runtime.run(inputs, outputs, 0)
    runtime.close()
    assert path.read_bytes() == double.RuntimeCache.content
    path.write_bytes(b"of the last time")
    again = load(graph, cache=path)
    again.run(inputs, outputs, 0)
    assert again.engine.contexts[0].config.cache.content == b"of the last time"
    again.close()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rank0.cache"]
    load(graph, cache=tmp_path / "none" / "rank0.cache").close()  # a directory that cannot be written to
    monkeypatch.delattr(double.RuntimeConfig, "create_runtime_cache")
    assert load(graph, cache=path).cache is None


def test_streamed_weights(graph: Graph) -> None:
    assert load(graph, streamable=1000).engine.weight_streaming_budget_v2 == 500  # what the double proposes
    assert load(graph, streamable=1000, weight_streaming_budget=70).engine.weight_streaming_budget_v2 == 70
    with pytest.raises(ConfigError, match="is 1001; this engine has 1000 bytes"):
        load(graph, streamable=1000, weight_streaming_budget=1001)
    with pytest.raises(ConfigError, match="built with weight_streaming"):
        load(graph, weight_streaming_budget=1)


def test_pointers_are_run_as_tensors_are(graph: Graph) -> None:
    session = session_of(graph, load(graph))
    with ModelRunner.from_engine(session):
        pass  # allocates the caches
    inputs, outputs = step(graph)
    inputs = {name: inputs[name] for name in ("input_ids", "write_indices", "logit_indices")}
    inputs["cache_rows"] = torch.arange(2)
    session.run(inputs, outputs)
    found = torch.empty_like(outputs["logits"])

    def at(tensor: torch.Tensor) -> Pointer:
        return Pointer(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))

    runtime = session.engine.runtime  # type: ignore[attr-defined]
    streams = []
    enqueue = runtime.run
    runtime.run = lambda *args: (streams.append((args[2], runtime.cuda.current())), enqueue(*args))
    session.run({name: at(one) for name, one in inputs.items()}, {"logits": at(found)}, 5)
    assert streams == [(5, 5)]  # inputs were copied on the stream that the engine runs on
    assert torch.equal(found, outputs["logits"])
    half = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert torch.equal(at(half).tensor(torch.device("cpu")), half)
    assert Pointer(0, torch.float32, (0, 4)).tensor(torch.device("cpu")).shape == (0, 4)


def test_a_run_asks_for_no_more_than_a_profile_admits(graph: Graph) -> None:
    limits = {spec.name: spec.maximum for spec in session_of(graph, load(graph)).engine.tensors}
    assert (limits["input_ids"], limits["logit_indices"]) == ((4, 48), (4, 3))
