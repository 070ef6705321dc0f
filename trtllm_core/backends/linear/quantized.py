"""Quantised weights in exported graphs: what each product computes, and its nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.config import QuantizedLayer
from trtllm_core.nn import Linear, VocabParallelEmbedding
from trtllm_core.nn.linear import MatMul
from trtllm_core.quantize import QuantizedWeight

MICROSOFT = "com.microsoft"


@torch.library.custom_op("trtllm_core::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    accuracy_level: int,
) -> torch.Tensor:
    """``x [..., in] -> [..., out]`` with a weight of ``trtllm_core.quantize``, symmetric or with zero points.

    ``accuracy_level`` is what ONNX Runtime computes in: 1 float32, 4 int8 activations; 0 leaves it to it.
    """
    form = "symmetric" if zero_points is None else "zero_points"
    how = QuantizedLayer(bits=bits, group_size=group_size, form=form)  # type: ignore[arg-type]
    return functional.linear(x, QuantizedWeight(how, codes, scales, zero_points).dequantize().to(x.dtype))


@quantized_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    accuracy_level: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("trtllm_core::quantized_rows", mutates_args=())
def quantized_rows(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """``ids [batch, tokens] -> [batch, tokens, in]``: rows of a table of symmetric codes, in the scales' dtype."""
    how = QuantizedLayer(bits=bits, group_size=group_size, form="symmetric")  # type: ignore[arg-type]
    return QuantizedWeight(how, codes, scales).dequantize(ids).to(scales.dtype)


@quantized_rows.register_fake
def _(ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    return scales.new_empty(*ids.shape, scales.shape[1] * group_size)


def use_graph_products(module: nn.Module, accuracy_level: int, signed_tables: bool) -> None:
    """Have quantised layers traced as ``quantized_linear``, and quantised tables as what takes rows of codes.

    ``signed_tables``: those rows are taken by ``quantized_rows``, which TensorRT's signed codes take the place in.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.quantized is not None:
            layer.matmul = _product(layer, layer.quantized, accuracy_level)
            if isinstance(layer, VocabParallelEmbedding):
                layer.lookup = (_signed_lookup if signed_tables else _lookup)(layer, layer.quantized)


def _product(layer: Any, how: QuantizedLayer, accuracy_level: int) -> MatMul:
    """Over the layer's own parameters, which tracing replaces."""

    def product(x: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        zeros = layer.zero_points if how.form == "zero_points" else None
        y: torch.Tensor = quantized_linear(x, codes, layer.scales, zeros, how.bits, how.group_size, accuracy_level)
        if how.form == "offsets":
            # Zero points of floating point make MatMulNBits slow, and DequantizeLinear has none. What is constant in a
            # group meets the group's sum.
            middle = 1 << (how.bits - 1)
            sums = x.reshape(*x.shape[:-1], -1, how.group_size).sum(-1)
            y = y + functional.linear(sums, layer.offsets + layer.scales * middle)
        return y if bias is None else y + bias

    return product


def _lookup(layer: Any, how: QuantizedLayer) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def lookup(input_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        zeros = layer.zero_points if how.form == "zero_points" else None
        offsets = layer.offsets if how.form == "offsets" else None
        weight = QuantizedWeight(how, codes, layer.scales, zeros, offsets)
        return weight.dequantize(input_ids).to(layer.scales.dtype)

    return lookup


def _signed_lookup(layer: Any, how: QuantizedLayer) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def lookup(input_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = quantized_rows(input_ids, codes, layer.scales, how.bits, how.group_size)
        return rows

    return lookup


def matmul_nbits() -> Callable[..., Any]:
    """The translation for ONNX Runtime, which has a kernel that reads the codes."""
    import onnxscript

    _register_matmul_nbits()
    microsoft: Any = onnxscript.values.Opset(MICROSOFT, 1)

    def translate(
        x: Any, codes: Any, scales: Any, zero_points: Any, bits: int, group_size: int, accuracy_level: int
    ) -> Any:
        out, groups = (int(size) for size in scales.shape)
        given = (x, codes, scales) if zero_points is None else (x, codes, scales, zero_points)
        return microsoft.MatMulNBits(
            *given, K=groups * group_size, N=out, bits=bits, block_size=group_size, accuracy_level=accuracy_level
        )

    return translate


def _register_matmul_nbits() -> None:
    """Tell ONNX the schema, as far as graphs here use it."""
    import onnx

    if onnx.defs.has("MatMulNBits", MICROSOFT):
        return
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    parameter, attribute = schema.FormalParameter, schema.Attribute
    onnx.defs.register_schema(
        schema(
            "MatMulNBits",
            MICROSOFT,
            1,
            inputs=[
                parameter("A", "T1"),
                parameter("B", "T2"),
                parameter("scales", "T1"),
                parameter("zero_points", "T2", param_option=optional),
            ],
            outputs=[parameter("Y", "T1")],
            type_constraints=[("T1", ["tensor(float)", "tensor(float16)"], ""), ("T2", ["tensor(uint8)"], "")],
            attributes=[
                attribute(name, schema.AttrType.INT, required=False)
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        )
    )


def dequantize_linear() -> Callable[..., Any]:
    """The translation for TensorRT, which keeps what ``DequantizeLinear`` reads as it is: signed, symmetric codes.

    The codes come from a file of their own: see ``write_signed``.
    """
    import onnxscript

    op: Any = onnxscript.values.Opset("", 24)

    def translate(
        x: Any, codes: Any, scales: Any, zero_points: Any, bits: int, group_size: int, accuracy_level: int
    ) -> Any:
        weight = op.DequantizeLinear(codes, scales, axis=1, block_size=group_size)
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    return translate


def signed_rows() -> Callable[..., Any]:
    """The translation of ``quantized_rows`` for TensorRT: the table's codes are INT8 by then, see ``write_signed``."""
    import onnxscript

    op: Any = onnxscript.values.Opset("", 24)

    def translate(ids: Any, codes: Any, scales: Any, bits: int, group_size: int) -> Any:
        table = op.DequantizeLinear(codes, scales, axis=1, block_size=group_size)
        return op.Gather(table, ids, axis=0)

    return translate


def write_signed(module: nn.Module, file: Path) -> dict[str, Signed]:
    """Write the codes of a module's quantised layers as ONNX's INT4 and INT8, by the names of their parameters.

    A signed code is the unsigned one less the middle, which turns its highest bit.
    """
    places: dict[str, Signed] = {}
    with file.open("wb") as out:
        for name, layer in module.named_modules():
            if isinstance(layer, Linear) and layer.quantized is not None:
                how, codes = layer.quantized, layer.weight.detach()
                signed = codes ^ (0x88 if how.bits == 4 else 0x80)
                shape = (codes.shape[0], codes.shape[1] * how.group_size)
                places[f"{name}.weight"] = Signed(how.bits, shape, out.tell(), signed.nbytes)
                out.write(signed.contiguous().numpy().data)
    return places


@dataclass(frozen=True)
class Signed:
    """A weight's codes in the file of ``write_signed``."""

    bits: int
    shape: tuple[int, int]
    offset: int
    nbytes: int
