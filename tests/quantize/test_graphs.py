"""Engines with quantised weights in ONNX Runtime, held against the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

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


def test_tensorrt_takes_none_yet(checkpoint: Path, plugins: Plugins) -> None:
    from trtllm_core.checkpoint import open_checkpoint

    wanted = LIMITS.replace(backend="tensorrt", quantization=QuantizationConfig(weights="int4"))
    with pytest.raises(ConfigError, match="'tensorrt' takes no quantised weights"):
        plan_engine(open_checkpoint(checkpoint), wanted, plugins)
