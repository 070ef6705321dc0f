"""``inspect`` and ``doctor`` on engines of each backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.engine.directory import read_config, write_config

LIMITS = BuildConfig(max_batch_size=2, max_input_len=24, max_seq_len=32, max_beam_width=2, dtype="float32")


@pytest.fixture(scope="module")
def onnx_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("onnx") / "engine"
    build_engine(tiny_checkpoint, directory, LIMITS.replace(backend="onnxruntime"))
    return directory


@pytest.fixture(scope="module")
def trt_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    directory = tmp_path_factory.mktemp("trt") / "engine"
    build_engine(tiny_checkpoint, directory, LIMITS.replace(backend="tensorrt", options={"max_draft_len": 3}))
    return directory


def counts(found: dict) -> dict[str, int]:
    return {group["kind"]: group["count"] for group in found["layers"]}


def test_inspect_torch(cli: Callable, tiny_engine: Path) -> None:
    found = json.loads(cli("inspect", tiny_engine, "--json").stdout)
    assert {spec["name"] for spec in found["tensors"] if not spec["is_input"]} == {"logits", "hidden_states"}
    assert counts(found)["RMSNorm"] == 5
    weights = {one["name"]: one for one in found["weights"]}
    stored = sum(one["bytes"] for one in weights.values())
    assert 0 < read_config(tiny_engine).ranks[0].bytes - stored < 16384  # the header
    assert found["memory"]["weights"] == read_config(tiny_engine).ranks[0].bytes
    out = cli("inspect", tiny_engine).stdout
    for text in ("packed_paged", "rank0.safetensors (", "RMSNorm", "F32", "told by"):
        assert text in out
    every = cli("inspect", tiny_engine, "--all").stdout
    assert all(name in every for name in weights)


def test_inspect_onnxruntime(cli: Callable, onnx_engine: Path) -> None:
    found = json.loads(cli("inspect", onnx_engine, "--json").stdout)
    assert counts(found)["GroupQueryAttention"] == 2  # rotation, cache and attention of two layers
    specs = {spec["name"]: spec for spec in found["tensors"]}
    assert specs["past_key_1"]["maximum"] == [4, 2, 32, 16]
    assert specs["present_key_1"]["shape"] == ["batch", 2, 32, 16]
    assert "cache_rows" not in specs
    out = cli("inspect", onnx_engine).stdout
    for text in ("padded_linear", "past_key_*", "rank0.onnx (", "GroupQueryAttention", "the ONNX graph"):
        assert text in out
    assert "past_key_1" not in out
    assert "past_key_1" in cli("inspect", onnx_engine, "--all").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what can be known without a GPU")
def test_inspect_tensorrt_without_a_gpu(cli: Callable, trt_engine: Path) -> None:
    found = json.loads(cli("inspect", trt_engine, "--json").stdout)
    assert "cannot be read here: TensorRT reads plans on a machine with a CUDA GPU" in found["told_by"]
    assert (counts(found)["ATTENTION_INPUT"], counts(found)["KV_CACHE_UPDATE"]) == (2, 4)
    context, generation = found["profiles"]
    assert context["input_ids"] == [[1, 1], [2, 12], [4, 24]]
    assert generation["input_ids"] == [[1, 1], [2, 2], [4, 4]]
    assert generation["past_value_0"][2] == [4, 2, 32, 16]
    assert found["details"]["aliases"]["present_key_0"] == "past_key_0"
    out = cli("inspect", trt_engine).stdout
    for text in ("tensorrt_rtx", "KV_CACHE_UPDATE", "profile", "past_key_*", "told by"):
        assert text in out


def test_inspect_refuses_what_is_not_there(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    assert "rank 3 is not one of them" in cli("inspect", tiny_engine, "--rank", "3", status=2).stderr
    assert "holds no engine" in cli("inspect", tmp_path, status=2).stderr


def test_doctor_onnxruntime(cli: Callable, onnx_engine: Path) -> None:
    out = cli("doctor", onnx_engine).stdout
    assert "rank0.onnx: a graph of the padded, linear contract, all its weights there" in out
    assert "as when it was built" in out


def changed(source: Path, target: Path, **record: object) -> Path:
    """A copy of an engine whose config.json has another record."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    config = read_config(source)
    write_config(target, config.replace(record={**config.record, **record}))
    return target


def test_doctor_onnxruntime_on_what_does_not_fit(cli: Callable, onnx_engine: Path, tmp_path: Path) -> None:
    newer = changed(onnx_engine, tmp_path / "newer", onnxruntime="99.0")
    assert "built with 99.0, and the older" in cli("doctor", newer).stdout
    broken = changed(onnx_engine, tmp_path / "broken")
    graph = broken / "rank0.onnx"
    size = graph.stat().st_size
    graph.unlink()
    graph.write_bytes(b"\xff" * size)
    assert "rank0.onnx is no ONNX graph" in cli("doctor", broken, status=2).stdout
    assert "rank0.onnx is no ONNX graph" in cli("inspect", broken, status=2).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what can be known without a GPU")
def test_doctor_tensorrt_without_a_gpu(cli: Callable, trt_engine: Path, tmp_path: Path) -> None:
    out = cli("doctor", trt_engine, status=2).stdout
    assert "which built the engine" in out
    assert "problem  GPU: there is none here: the engine can be built and checked, and not run" in out
    older = changed(trt_engine, tmp_path / "older", version="1.6.0")
    assert "pip install tensorrt_rtx==1.6.0, or build it again" in cli("doctor", older, status=2).stdout
    other = changed(trt_engine, tmp_path / "other", module="tensorrt", version="11.1.0")
    assert "tensorrt is not installed" in cli("doctor", other, status=2).stdout


def test_doctor_on_a_truncated_plan(cli: Callable, trt_engine: Path, tmp_path: Path) -> None:
    cut = changed(trt_engine, tmp_path / "cut")
    plan = (cut / "rank0.engine").read_bytes()
    (cut / "rank0.engine").unlink()
    (cut / "rank0.engine").write_bytes(plan[:-9])
    out = cli("doctor", cut, status=2).stdout
    assert "it was truncated or changed; build the engine again" in out
