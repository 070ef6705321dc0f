"""Engines on a GPU that TensorRT supports: ``pytest -m tensorrt_gpu``. The rest is tested without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig, Session, build_engine, use
from trtllm_core.backends.tensorrt.backend import open_plan
from trtllm_core.backends.tensorrt.diagnosing import capability_problem, diagnose
from trtllm_core.backends.tensorrt.inspecting import inspect_plan
from trtllm_core.backends.tensorrt.library import installed
from trtllm_core.engine.directory import read_config
from trtllm_core.testing.checkpoints import write_llama

from .conftest import LIMITS

PROMPTS = [[5, 6, 7, 8] * 5, [11], list(range(1, 41)), [42, 17]]
GREEDY = SamplingConfig(max_new_tokens=20, end_id=(), return_dict=True, output_log_probs=True)
CLOSE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""How far the log-probabilities of chosen tokens may be from the torch engine's."""


def usable() -> tuple[list[str], str]:
    """The modules that can run here, and why others cannot."""
    if not torch.cuda.is_available():
        return [], "PyTorch finds no CUDA GPU here"
    if not installed():
        return [], "neither tensorrt nor tensorrt_rtx is installed"
    problems = {name: capability_problem(name, torch.cuda.get_device_capability()) for name in installed()}
    return [name for name, why in problems.items() if why is None], "; ".join(why for why in problems.values() if why)


MODULES, WHY_NOT = usable()
pytestmark = [pytest.mark.tensorrt_gpu, pytest.mark.skipif(not MODULES, reason=WHY_NOT or "a GPU is here")]

Build = Callable[..., Path]


@pytest.fixture(scope="module", params=MODULES or ["none"])
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def build(module: str, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Build:
    """``build(dtype, backend, **options)``: the directory of an engine, each made once."""
    checkpoint, made = write_llama(tmp_path_factory.mktemp("hf")), {}

    def make(dtype: str = "float32", backend: str = "tensorrt", **options: Any) -> Path:
        key = (dtype, backend, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("engine") / "engine"
            chosen = {"module": module, **options} if backend == "tensorrt" else {}
            limits = LIMITS.replace(dtype=dtype, backend=backend, options=chosen)
            build_engine(checkpoint, made[key], limits, plugins=plugins)
        return made[key]

    return make


def generate(directory: Path, plugins: Plugins, sampling: SamplingConfig = GREEDY, **options: Any) -> list[Any]:
    session = Session.from_directory(directory, plugins=plugins, **options)
    with ModelRunner.from_engine(session, plugins=plugins) as runner:
        return list(runner.generate(PROMPTS, sampling)["outputs"])


def tokens(outputs: list[Any]) -> list[tuple[int, ...]]:
    return [one.tokens for one in outputs]


@pytest.mark.parametrize("attention", ["lower_right", "mask"])
def test_the_tokens_are_those_of_torch(attention: str, build: Build, plugins: Plugins) -> None:
    due = generate(build(backend="torch"), plugins)
    found = generate(build(attention=attention), plugins)
    assert tokens(found) == tokens(due)
    for ours, theirs in zip(found, due, strict=True):
        assert np.allclose(ours.log_probs, theirs.log_probs, atol=CLOSE["float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_right_and_mask_agree(dtype: str, build: Build, plugins: Plugins) -> None:
    """In half precision, where attention has a kernel of its own. Compared up to the first token that differs."""
    pairs = (generate(build(dtype, attention=attention), plugins) for attention in ("lower_right", "mask"))
    compared = 0
    for one, other in zip(*pairs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), None)
        assert np.allclose(one.log_probs[:same], other.log_probs[:same], atol=CLOSE[dtype])
        compared += len(one.tokens[:same])
    assert compared > len(PROMPTS) * GREEDY.max_new_tokens // 2


def test_several_positions_a_row(build: Build, plugins: Plugins) -> None:
    directory = build(max_draft_len=3)
    plain = generate(directory, plugins)
    drafted = generate(directory, plugins, GREEDY.replace(decoder=use("ngram", tokens=3), output_log_probs=False))
    assert tokens(drafted) == tokens(plain)
    assert sum(one.accepted_tokens for one in drafted)


@pytest.mark.parametrize("budget", [0, None])
def test_streamed_weights(budget: int | None, build: Build, plugins: Plugins) -> None:
    directory = build(weight_streaming=True)
    assert tokens(generate(directory, plugins, weight_streaming_budget=budget)) == tokens(generate(build(), plugins))


def test_weights_as_inputs(build: Build, plugins: Plugins) -> None:
    assert tokens(generate(build(weights="inputs"), plugins)) == tokens(generate(build(), plugins))


def test_cuda_graphs(build: Build, plugins: Plugins) -> None:
    assert tokens(generate(build(), plugins, cuda_graph=True)) == tokens(generate(build(), plugins))


def test_the_runtime_cache(module: str, build: Build, plugins: Plugins) -> None:
    if module != "tensorrt_rtx":
        pytest.skip("kernels are compiled by tensorrt_rtx alone")
    directory = build()
    sessions = []
    for _ in range(2):
        session = Session.from_directory(directory, plugins=plugins)
        with ModelRunner.from_engine(session, plugins=plugins) as runner:
            sessions.append(tokens(runner.generate(PROMPTS, GREEDY)["outputs"]))
        session.engine.runtime.close()  # type: ignore[attr-defined]
        assert (directory / "rank0.cache").stat().st_size
    assert sessions[0] == sessions[1]


def test_another_stream(build: Build, plugins: Plugins) -> None:
    due = generate(build(), plugins)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert tokens(generate(build(), plugins)) == tokens(due)


def test_inspect_and_doctor(build: Build) -> None:
    path = build() / "rank0.engine"
    config = read_config(path.parent)
    found = inspect_plan(open_plan(path, config), path, config)
    assert found.told_by.startswith("the engine inspector of")
    assert len(found.profiles) == 2
    assert found.layers
    assert found.details["aliases"]["present_key_0"] == "past_key_0"
    assert {one.level for one in diagnose(path, config)} == {"ok"}
