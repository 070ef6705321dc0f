"""Engines with quantised weights in ONNX Runtime, held against the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, QuantizationConfig
from trtllm_core.engine.build import build_engine, plan_engine
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import Plugins

pytest.importorskip("onnxruntime")

LIMITS = BuildConfig(
    backend="onnxruntime", dtype="float32", max_seq_len=64, max_input_len=48, max_num_tokens=192, max_batch_size=4
)


def build(
    source: Path, directory: Path, plugins: Plugins, accuracy_level: int = 1, dtype: str = "float32", **wish: Any
) -> Any:
    options = {"verify": True, "accuracy_level": accuracy_level}
    wanted = LIMITS.replace(quantization=QuantizationConfig(**wish), options=options, dtype=dtype)
    return build_engine(source, directory, wanted, plugins=plugins)


@pytest.mark.parametrize("wish", [{"weights": "int4"}, {"weights": "int8"}, {"weights": "int4", "symmetric": True}])
def test_a_graph_computes_what_torch_does(tied: Path, tmp_path: Path, plugins: Plugins, wish: dict[str, Any]) -> None:
    """Of the same codes, the tied table's among them."""
    config = build(tied, tmp_path / "engine", plugins, **wish)
    assert config.record["accuracy_level"] == 1
    verified = config.record["verified"]
    assert verified["largest_error"] < 1e-4 * verified["largest_logit"]
    nodes = list(onnx.load(tmp_path / "engine" / "rank0.onnx", load_external_data=False).graph.node)
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 2 * 4 + 1
    assert not [node for node in nodes if node.op_type in ("MatMul", "Gemm")]


def test_a_gguf_keeps_its_values(quantised_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    verified = build(quantised_gguf, tmp_path / "engine", plugins, weights="keep").record["verified"]
    assert verified["largest_error"] < 1e-4 * verified["largest_logit"]


def test_int8_activations_cost_what_they_cost(quantised_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    config = build(quantised_gguf, tmp_path / "engine", plugins, accuracy_level=4, weights="keep")
    verified = config.record["verified"]
    assert 1e-4 < verified["largest_error"] / verified["largest_logit"] < 0.1


def test_one_scale_a_row_is_refused(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    """Where the row is no power of two."""
    from trtllm_core.testing.checkpoints import write_llama

    odd = write_llama(tmp_path / "hf", hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ConfigError, match="groups are powers of two"):
        build(odd, tmp_path / "engine", plugins, weights="int8", group_size=0)


# TensorRT

TRT = LIMITS.replace(backend="tensorrt", dtype="float16")


@pytest.mark.parametrize(("wish", "dtype"), [("int4", "float16"), ("int8", "bfloat16")])
def test_tensorrt_engines_keep_codes(checkpoint: Path, tmp_path: Path, plugins: Plugins, wish: Any, dtype: Any) -> None:
    """The network passes its checks, and its graph computes what torch does with the same codes."""
    pytest.importorskip("tensorrt_rtx")
    wanted = TRT.replace(dtype=dtype, quantization=QuantizationConfig(weights=wish), options={"verify": True})
    config = build_engine(checkpoint, tmp_path / "engine", wanted, plugins=plugins)
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == ["config.json", "rank0.engine"]
    assert config.quantization is not None
    assert {layer.form for layer in config.quantization.layers.values()} == {"symmetric"}
    verified = config.record["verified"]
    assert verified["largest_error"] < 5e-3 * verified["largest_logit"]


def test_what_tensorrt_refuses(checkpoint: Path, quantised_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    pytest.importorskip("tensorrt_rtx")
    for source, fields, says in (
        (
            checkpoint,
            {"quantization": QuantizationConfig(weights="int4", symmetric=False)},
            "takes symmetric codes alone",
        ),
        (quantised_gguf, {"quantization": QuantizationConfig(weights="keep")}, "takes symmetric codes alone"),
        (
            checkpoint,
            {"quantization": QuantizationConfig(weights="int4"), "options": {"weights": "inputs"}},
            "are part of a TensorRT engine",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            build_engine(source, tmp_path / "engine", TRT.replace(**fields), plugins=plugins)


def test_a_tied_table_stays_whole_for_tensorrt(tied: Path, plugins: Plugins) -> None:
    wanted = TRT.replace(quantization=QuantizationConfig(weights="int4"))
    config, _, _ = plan_engine(open_checkpoint(tied), wanted, plugins)
    assert config.quantization is not None
    assert "embedding" not in config.quantization.layers
    assert len(config.quantization.layers) == 2 * 4
