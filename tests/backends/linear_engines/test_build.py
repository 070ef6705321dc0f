"""Engines of TensorRT-RTX, built without a GPU, and what is refused before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtllm_core import BuildConfig, Plugins, Session, build_engine
from trtllm_core.backends.tensorrt.backend import check_version
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import EngineConfig
from trtllm_core.errors import (
    ConfigError,
    EngineCorruptError,
    EngineUnsupportedError,
    EngineVersionError,
)
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.host_cuda import HostCuda
from trtllm_core.testing.reference import ReferenceModel

from .conftest import LIMITS

SMALL: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(vocab_size=67, n_embd=64, n_head=4, n_layer=2, n_positions=96),
    "llama": transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    ),
    "bloom": transformers.BloomConfig(vocab_size=67, hidden_size=48, n_layer=2, n_head=6),
}
HALF = {"float16": 5e-3, "bfloat16": 1e-5}
"""How far the graph may be from the torch backend, as a share of the largest logit. bfloat16 is its float32 twin."""


def trt_build(**options: Any) -> BuildConfig:
    dtype = options.pop("dtype", "float16")
    return LIMITS.replace(dtype=dtype, backend="tensorrt", options=options)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", SMALL)
def test_every_family_builds_and_its_graph_is_right(family: str, dtype: str, tmp_path: Path, plugins: Plugins) -> None:
    model = ReferenceModel(SMALL[family], tmp_path, plugins, gain=0.8)
    directory = tmp_path / "engine"
    config = build_engine(model.path, directory, trt_build(dtype=dtype, verify=True), plugins=plugins)
    assert (directory / "rank0.engine").stat().st_size == config.ranks[0].bytes
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "rank0.engine"]
    record = config.record
    assert record["module"] == "tensorrt_rtx"
    assert record["attention"] == ("mask" if family == "bloom" else "lower_right")
    found = record["verified"]
    assert found["largest_error"] < HALF[dtype] * found["largest_logit"]
    assert found.get("twin_of") == ("bfloat16" if dtype == "bfloat16" else None)


@pytest.mark.usefixtures("trt")
def test_weights_as_inputs_stay_beside_a_small_engine(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    build = trt_build(weights="inputs", verify=True, max_draft_len=3, weight_streaming=True, attention="mask")
    config = build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins)
    (file,) = config.ranks
    assert [companion.name for companion in file.companions] == ["rank0.safetensors"]
    assert file.total_bytes == file.bytes + file.companions[0].bytes
    found = config.record["verified"]
    assert found["largest_error"] < 5e-3 * found["largest_logit"]
    (tmp_path / "engine" / "rank0.safetensors").unlink()
    with pytest.raises(EngineCorruptError, match=r"rank0\.safetensors is missing"):
        Session.from_directory(tmp_path / "engine", plugins=plugins)


@pytest.mark.usefixtures("trt")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_builds_and_says_why_it_does_not_run(
    checkpoint: Path, tmp_path: Path, plugins: Plugins
) -> None:
    directory = tmp_path / "engine"
    build_engine(checkpoint, directory, trt_build(), plugins=plugins)
    with pytest.raises(EngineUnsupportedError, match="needs a CUDA GPU to run, and PyTorch finds none here"):
        Session.from_directory(directory, plugins=plugins)
    with pytest.raises(ConfigError, match="run on CUDA GPUs, not on 'cpu': use the onnxruntime backend"):
        Session.from_directory(directory, plugins=plugins, device="cpu")
    config = json.loads((directory / "config.json").read_text())
    config["record"]["version"] = "1.0.0"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineVersionError, match=r"built by tensorrt_rtx 1\.0\.0, and .* is installed"):
        Session.from_directory(directory, plugins=plugins)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"head_dim": 12}, {}, "multiples of 8 from 8 to 512, and this model's are 12"),
        ({}, {"atention": "mask"}, "has no field 'atention'"),
        ({}, {"attention": "upper_left"}, "attention = 'upper_left'"),
        ({}, {"compute_capabilities": ["1.0"]}, "no compute capability '1.0'; it knows .*8.9"),
    ],
)
def test_what_no_engine_is_built_of(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, plugins: Plugins
) -> None:
    source = write_llama(tmp_path / "hf", **changes)
    with pytest.raises((ConfigError, EngineUnsupportedError), match=message):
        build_engine(source, tmp_path / "engine", trt_build(**options), plugins=plugins)
    assert not (tmp_path / "engine").exists()


def test_a_module_that_is_not_installed(tmp_path: Path, checkpoint: Path, plugins: Plugins) -> None:
    with pytest.raises(EngineUnsupportedError, match=r"tensorrt is not installed: pip install trtllm-core\[tensorrt\]"):
        build_engine(checkpoint, tmp_path / "engine", trt_build(module="tensorrt"), plugins=plugins)


def test_another_version_of_a_plan(make_graph: Any) -> None:
    graph = make_graph("lower_right", "float32")
    config: EngineConfig = graph.config.replace(record={"module": "tensorrt", "version": "11.0.0"})
    with pytest.raises(EngineVersionError, match=r"pip install tensorrt==11\.0\.0, or build it again"):
        check_version(config, "11.1.0")
    with pytest.raises(
        EngineUnsupportedError, match="cannot run this engine on this machine: it is of another version"
    ):
        TensorRTRuntime(double, double.serialise(graph.path, [], version="11.0.0"), HostCuda())


def test_a_truncated_plan(make_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = double.serialise(make_graph("lower_right", "float32").path, [])[:-9]
    with pytest.raises(EngineUnsupportedError, match="damaged"):
        TensorRTRuntime(double, plan, HostCuda())
    monkeypatch.delattr(double.Runtime, "get_engine_validity")  # as tensorrt has it
    with pytest.raises(EngineCorruptError, match="truncated, or written by another version"):
        TensorRTRuntime(double, plan, HostCuda())
