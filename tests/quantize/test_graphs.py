"""Engines with quantised weights in ONNX Runtime, held against the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, Quantization, QuantizationConfig, QuantizedLayer
from trtllm_core.engine.build import build_engine, plan_engine
from trtllm_core.engine.quantization import byte_tables_alone
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


def test_what_tensorrt_refuses(checkpoint: Path, tied: Path, tmp_path: Path, plugins: Plugins) -> None:
    pytest.importorskip("tensorrt_rtx")
    for source, fields, says in (
        (
            checkpoint,
            {"quantization": QuantizationConfig(weights="int4", symmetric=False)},
            "takes symmetric codes alone",
        ),
        (
            tied,
            {"quantization": QuantizationConfig(weights="int4", head_bits=4)},
            "has codes of 8 bits here, and 'embedding' would have 4",
        ),
        (
            checkpoint,
            {"quantization": QuantizationConfig(weights="int4"), "options": {"weights": "inputs"}},
            "are part of a TensorRT engine",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            build_engine(source, tmp_path / "engine", TRT.replace(**fields), plugins=plugins)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensorrt_keeps_a_gguf_s_codes(quantised_gguf: Path, tmp_path: Path, plugins: Plugins, dtype: Any) -> None:
    """Q4_1's offsets too: what is constant in a group meets the sum of the group's activations."""
    pytest.importorskip("tensorrt_rtx")
    wanted = TRT.replace(dtype=dtype, quantization=QuantizationConfig(weights="keep"), options={"verify": True})
    config = build_engine(quantised_gguf, tmp_path / "engine", wanted, plugins=plugins)
    assert config.quantization is not None
    assert {layer.form for layer in config.quantization.layers.values()} == {"symmetric", "offsets"}
    verified = config.record["verified"]
    assert verified["largest_error"] < (5e-3 if dtype == "float16" else 1e-5) * verified["largest_logit"]


def test_tensorrt_s_tied_table_has_codes(tied: Path, tmp_path: Path, plugins: Plugins) -> None:
    """Of 8 bits, and the embedding takes rows of them."""
    pytest.importorskip("tensorrt_rtx")
    wanted = TRT.replace(quantization=QuantizationConfig(weights="int4"), options={"verify": True})
    config = build_engine(tied, tmp_path / "engine", wanted, plugins=plugins)
    assert config.quantization is not None
    assert (config.quantization.layers["embedding"].bits, len(config.quantization.layers)) == (8, 2 * 4 + 1)
    verified = config.record["verified"]
    assert verified["largest_error"] < 5e-3 * verified["largest_logit"]


def test_a_table_of_other_codes_stays_whole_for_tensorrt(tied: Path, plugins: Plugins) -> None:
    """Where a file's codes are kept; where they were chosen it is refused. 16 bits are the engine's dtype."""
    wanted = TRT.replace(quantization=QuantizationConfig(weights="int4", head_bits=16))
    config, _, _ = plan_engine(open_checkpoint(tied), wanted, plugins)
    assert config.quantization is not None
    assert "embedding" not in config.quantization.layers
    four = QuantizedLayer(bits=4, group_size=32, form="symmetric")
    made = Quantization(weights="keep", layers={"embedding": four, "up": four})
    assert byte_tables_alone(made, ["embedding"]).layers == {"up": four}
