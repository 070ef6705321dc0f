"""What a graph of the padded, linear contract is made of, read from its file. Nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_core.backends.linear.contract import cache_names, tensor_specs
from trtllm_core.config import EngineConfig
from trtllm_core.errors import EngineCorruptError
from trtllm_core.plugin import LayerGroup, TensorSpec
from trtllm_core.plugin.inspection import group_layers


def graph_tensors(config: EngineConfig) -> tuple[TensorSpec, ...]:
    """Inputs and outputs of the graph itself: the caches, and not the rows of them that a run takes."""
    model, build = config.model, config.build
    sizes = (model.num_kv_heads, build.max_seq_len, model.head_size)
    steps = [spec for spec in tensor_specs(config) if spec.name != "cache_rows"]

    def cache(name: str, is_input: bool) -> TensorSpec:
        return TensorSpec(name, model.dtype, ("batch", *sizes), is_input, (1, *sizes), (build.max_branches, *sizes))

    past = [cache(name, True) for name in cache_names(model.num_layers, "past")]
    present = [cache(name, False) for name in cache_names(model.num_layers, "present")]
    inputs, outputs = [spec for spec in steps if spec.is_input], [spec for spec in steps if not spec.is_input]
    return (*inputs, *past, *outputs, *present)


def read_graph(path: Path) -> Any:
    """The ``ModelProto``, without its weights.

    Raises:
        EngineCorruptError: it cannot be read.
    """
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's, which has no base to speak of
        raise EngineCorruptError(f"{path.name} is no ONNX graph: {error}; build the engine again") from error


def graph_layers(proto: Any) -> tuple[LayerGroup, ...]:
    """The graph's nodes, by operator."""
    return group_layers((node.name, node.op_type) for node in proto.graph.node)


def graph_problems(proto: Any, directory: Path, config: EngineConfig) -> list[str]:
    """What of the graph is not as the contract and the files beside it have it."""
    names = {one.name for one in (*proto.graph.input, *proto.graph.output)}
    problems = [f"it has no {spec.name}" for spec in graph_tensors(config) if spec.name not in names]
    for tensor in proto.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        file = directory / place["location"]
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        if not file.is_file() or end > file.stat().st_size:
            problems.append(f"its weight {tensor.name!r} is to lie in {file.name} before byte {end}, and does not")
    return problems
