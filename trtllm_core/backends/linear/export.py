"""From a family's module to an ONNX graph whose weights stay where they are on disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtllm_core.backends.linear import ops
from trtllm_core.backends.linear.context import AttentionKind, LinearModule
from trtllm_core.backends.linear.contract import cache_names
from trtllm_core.backends.linear.grouped import fuse_residuals
from trtllm_core.backends.linear.ops import Dialect
from trtllm_core.backends.linear.quantized import Signed, use_graph_products, write_signed
from trtllm_core.backends.linear.watching import check_watched, watched_modules
from trtllm_core.config import EngineConfig
from trtllm_core.nn import RMSNorm

OPSET = 24


@dataclass(frozen=True)
class GraphOptions:
    """What kind of graph is made of a module."""

    dialect: Dialect
    attention: AttentionKind
    weights_as_inputs: bool = False
    """Matrices are inputs of the graph, under the names of the module's parameters, and no part of it."""
    accuracy_level: int = 0
    """Of products with quantised weights: see ``quantized_linear``."""
    debug_tensors: tuple[str, ...] = ()
    """Patterns of modules whose outputs the graph gives too, under their names: see ``watched_modules``."""

    @property
    def bounded(self) -> bool:
        """The graph has the input ``cache_entries``, and attention looks at as many entries of the caches."""
        return self.dialect == "onnxruntime" and self.attention == "mask"


def export_module(
    module: nn.Module, config: EngineConfig, options: GraphOptions, file: Path, stored: Mapping[str, tuple[int, int]]
) -> Any:
    """The ONNX ``ModelProto`` of a family's module, whose parameters are external data in ``file``.

    Args:
        module: with its weights in place (mapped ones are not read) and its tables prepared.
        config: of the engine.
        options: see there.
        file: of the weights, in the directory that the graph will lie in. TensorRT's codes are written beside it.
        stored: offset and length of each parameter in it, in bytes.
    """
    for layer in module.modules():
        if isinstance(layer, RMSNorm):
            layer.kernel = _rms_norm(layer)
    use_graph_products(module, options.accuracy_level, options.dialect == "tensorrt")
    layers, watched = config.model.num_layers, watched_modules(module, options.debug_tensors)
    example, shapes = _example(config), _dynamic_shapes(config)
    names = ["input_ids", "write_indices", "logit_indices", *cache_names(layers, "past")]
    if options.bounded:
        names.append("cache_entries")
    else:
        del example["cache_entries"], shapes["cache_entries"]
    with _quiet_exporter():
        program = torch.onnx.export(
            LinearModule(module, options.attention, watched).eval(),
            (),
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["logits", *cache_names(layers, "present"), *watched],
            dynamic_shapes=shapes,
            custom_translation_table=ops.translations(options.dialect),
            optimize=False,  # folding renames small weights, and then nothing finds them on disk
            verbose=False,
        )
    assert program is not None
    if options.dialect == "tensorrt" and config.quantization is not None:
        _place_signed(program.model, signed_file(file).name, write_signed(module, signed_file(file)))
    if options.dialect == "onnxruntime":
        fuse_residuals(program.model)
    _place_weights(program.model, file.name, stored, options.weights_as_inputs)
    proto = _stripped(program.model)
    if options.dialect == "tensorrt":
        ops.add_attention_body(proto, options.attention)
    check_watched(proto, watched)
    return proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of what it does not need, such as torchvision, and of tables that layers share."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rms_norm(layer: RMSNorm) -> Any:
    return lambda x: ops.rms_norm(x, layer.weight, layer.eps)


def _example(config: EngineConfig) -> dict[str, Any]:
    """Inputs for tracing. No size is 1, nor equal to another's, which would tie the two.

    Only their shapes matter: nothing is written to the caches, which for a large model would take a gigabyte.
    """
    model, build = config.model, config.build
    shape = (2, model.num_kv_heads, build.max_seq_len, model.head_size)
    dtype = getattr(torch, config.model.dtype)
    return {
        "input_ids": torch.zeros(2, 5, dtype=torch.int64),
        "write_indices": torch.zeros(2, dtype=torch.int64),
        "logit_indices": torch.zeros(2, 3, dtype=torch.int64),
        "past": [torch.empty(shape, dtype=dtype) for _ in range(2 * model.num_layers)],
        "cache_entries": torch.arange(7),
    }


def _dynamic_shapes(config: EngineConfig) -> dict[str, Any]:
    dim = torch.export.Dim
    batch, tokens = dim("batch", min=1, max=65536), dim("tokens", min=1, max=config.build.max_seq_len)
    asked, entries = dim("asked", min=1, max=config.build.max_seq_len), dim("entries", min=1)
    return {
        "input_ids": {0: batch, 1: tokens},
        "write_indices": {0: batch},
        "logit_indices": {0: batch, 1: asked},
        "past": [{0: batch} for _ in range(2 * config.model.num_layers)],
        "cache_entries": {0: entries},
    }


def _place_weights(model: Any, file: str, stored: Mapping[str, tuple[int, int]], as_inputs: bool) -> None:
    import onnx_ir

    for name, value in list(model.graph.initializers.items()):
        place = stored.get(name.removeprefix("module."))
        if place is None or isinstance(value.const_value, onnx_ir.ExternalTensor):
            continue
        if as_inputs and len(value.shape) > 1:
            del model.graph.initializers[name]
            value.name, value.const_value = name.removeprefix("module."), None
            model.graph.inputs.append(value)
        else:
            value.const_value = onnx_ir.ExternalTensor(file, *place, value.dtype, shape=value.shape, name=name)


def signed_file(weights: Path) -> Path:
    """Where a graph for TensorRT has its codes, beside the other weights."""
    return weights.with_suffix(".codes")


def _place_signed(model: Any, file: str, signed: Mapping[str, Signed]) -> None:
    """A parameter of packed bytes becomes the matrix of codes that it holds."""
    import onnx_ir

    for name, value in model.graph.initializers.items():
        place = signed.get(name.removeprefix("module."))
        if place is not None:
            value.dtype = onnx_ir.DataType.INT4 if place.bits == 4 else onnx_ir.DataType.INT8
            value.shape = onnx_ir.Shape(place.shape)
            value.const_value = onnx_ir.ExternalTensor(
                file, place.offset, place.nbytes, value.dtype, shape=value.shape, name=name
            )


def _stripped(model: Any) -> Any:
    """As a proto, without the exporter's notes, which name files of this machine."""
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]
    return proto


def write_graph(proto: Any, path: Path) -> None:
    """Write the graph; its weights are in the file that it names."""
    path.write_bytes(proto.SerializeToString())
