"""The operators that families' modules are exported through: what each computes, and its node in the ONNX graph.

Torch runs the first (eager, the reference), the exporter writes the second. Queries are scaled before they come here,
so that no attention scales again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

Dialect = Literal["onnxruntime", "tensorrt"]
"""Whose operators a graph uses beside standard ONNX: ONNX Runtime's, or TensorRT's attention with a body for others."""


@torch.library.custom_op("trtllm_core::kv_update", mutates_args=())
def kv_update(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    """``cache [batch, kv_heads, entries, d]`` with ``update [batch, kv_heads, tokens, d]`` from ``write_indices`` on.

    ``write_indices`` is int64 ``[batch]``. Functional here; engines bind input and output to one buffer.
    """
    batch, heads, tokens, size = update.shape
    entry = write_indices[:, None] + torch.arange(tokens, device=cache.device)
    index = entry[:, None, :, None].expand(batch, heads, tokens, size)
    return torch.scatter(cache, 2, index, update.to(cache.dtype))


@torch.library.custom_op("trtllm_core::attention_lower_right", mutates_args=())
def attention_lower_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_lengths: torch.Tensor) -> torch.Tensor:
    """Attention of ``q [batch, heads, tokens, d]`` over ``k``, ``v [batch, kv_heads, entries, d]``.

    ``kv_lengths`` (int64 ``[batch]``) are the entries that the row's last query sees: query i of row b sees entry j
    where ``j <= i + kv_lengths[b] - tokens``.
    """
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    seen = j <= i + (kv_lengths - q.shape[2])[:, None, None]
    return attention_masked(q, k, v, seen.unsqueeze(1), 0.0)  # type: ignore[no-any-return]


@torch.library.custom_op("trtllm_core::attention_masked", mutates_args=())
def attention_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softcap: float
) -> torch.Tensor:
    """Attention with a mask that broadcasts to ``[batch, heads, tokens, entries]``: bool (may see) or added to scores.

    ``softcap`` bounds the scores before the mask: ``softcap * tanh(score / softcap)``; 0 does not.
    """
    if not softcap:
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=gqa)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@torch.library.custom_op("trtllm_core::rotary", mutates_args=())
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Turn the first ``dim`` elements of each head of ``x [batch, heads, tokens, d]`` by halves.

    ``cos`` and ``sin`` are ``[positions, dim / 2]``, ``positions`` int64 ``[batch, tokens]``.
    """
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


@torch.library.custom_op("trtllm_core::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in float32."""
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@kv_update.register_fake
def _(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cache)


@attention_lower_right.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_lengths: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


@attention_masked.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softcap: float) -> torch.Tensor:
    return torch.empty_like(q)


@rotary.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(x)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def translations(dialect: Dialect) -> dict[Any, Callable[..., Any]]:
    """The ONNX nodes (opset 24) of each operator, as ``torch.onnx.export`` takes them."""
    import onnxscript

    from trtllm_core.backends.linear.grouped import group_query_attention
    from trtllm_core.backends.linear.quantized import dequantize_linear, matmul_nbits, signed_rows

    op: Any = onnxscript.values.Opset("", 24)
    trt: Any = onnxscript.values.Opset("trt", 1)

    def onnx_kv_update(cache: Any, update: Any, write_indices: Any) -> Any:
        return op.TensorScatter(cache, update, write_indices, axis=2, mode="linear")

    def onnx_attention_masked(q: Any, k: Any, v: Any, mask: Any, softcap: float) -> Any:
        return op.Attention(q, k, v, mask, scale=1.0, softcap=softcap)[0]

    def trt_attention_masked(q: Any, k: Any, v: Any, mask: Any, softcap: float) -> Any:
        return trt.TRT_Attention(q, k, v, mask, None, None, causal_kind="none", TRT_decomposable=1)

    def trt_attention_lower_right(q: Any, k: Any, v: Any, kv_lengths: Any) -> Any:
        lengths = op.Cast(kv_lengths, to=onnxscript.ir.DataType.INT32)
        return trt.TRT_Attention(q, k, v, None, None, lengths, causal_kind="lower_right", TRT_decomposable=1)

    def onnx_rotary(x: Any, cos: Any, sin: Any, positions: Any, dim: int) -> Any:
        return op.RotaryEmbedding(x, cos, sin, positions, interleaved=0, rotary_embedding_dim=dim)

    def onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)

    def onnx_slices(x: Any, sizes: Any, dim: int) -> tuple[Any, ...]:
        ends = list(accumulate(sizes))
        axis = op.Constant(value_ints=[dim % len(x.shape)])
        return tuple(
            op.Slice(x, op.Constant(value_ints=[end - size]), op.Constant(value_ints=[end]), axis)
            for size, end in zip(sizes, ends, strict=True)
        )

    def onnx_split(x: Any, size: int, dim: int = 0) -> tuple[Any, ...]:
        whole, rest = divmod(int(x.shape[dim]), size)
        return onnx_slices(x, [size] * whole + [rest] * bool(rest), dim)

    def onnx_split_with_sizes(x: Any, sizes: Any, dim: int = 0) -> tuple[Any, ...]:
        return onnx_slices(x, [int(size) for size in sizes], dim)

    if dialect == "tensorrt":
        _register_trt_attention()
    ours, aten = torch.ops.trtllm_core, torch.ops.aten
    return {
        ours.quantized_linear.default: matmul_nbits() if dialect == "onnxruntime" else dequantize_linear(),
        ours.quantized_rows.default: signed_rows(),
        ours.grouped_attention.default: group_query_attention(),
        ours.kv_update.default: onnx_kv_update,
        ours.attention_lower_right.default: trt_attention_lower_right,
        ours.attention_masked.default: onnx_attention_masked if dialect == "onnxruntime" else trt_attention_masked,
        ours.rotary.default: onnx_rotary,
        ours.rms_norm.default: onnx_rms_norm,
        # The exporter's own make sequences of them, which TensorRT does not know.
        aten.split.Tensor: onnx_split,
        aten.split_with_sizes.default: onnx_split_with_sizes,
    }


def _register_trt_attention() -> None:
    """Tell ONNX the schema of TensorRT's attention, as TensorRT 11.1 has it."""
    import onnx

    if onnx.defs.has("TRT_Attention", "trt"):
        return
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    parameter, attribute = schema.FormalParameter, schema.Attribute
    onnx.defs.register_schema(
        schema(
            "TRT_Attention",
            "trt",
            1,
            inputs=[
                parameter("Q", "T"),
                parameter("K", "T"),
                parameter("V", "T"),
                parameter("mask", "M", param_option=optional),
                parameter("query_lengths", "tensor(int32)", param_option=optional),
                parameter("kv_lengths", "tensor(int32)", param_option=optional),
            ],
            outputs=[parameter("Y", "T")],
            type_constraints=[("T", floats, ""), ("M", [*floats, "tensor(bool)"], "")],
            attributes=[
                attribute("causal_kind", schema.AttrType.STRING, required=False),
                attribute("TRT_decomposable", schema.AttrType.INT, required=False),
            ],
        )
    )


_LOWER_RIGHT = """
<domain: "trt", opset_import: ["" : 24]>
TRT_Attention <causal_kind, TRT_decomposable> (Q, K, V, mask, query_lengths, kv_lengths) => (Y)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  query_shape = Shape <start = 2, end = 3> (Q)
  entry_shape = Shape <start = 2, end = 3> (K)
  queries = Squeeze (query_shape)
  entries = Squeeze (entry_shape)
  query = Range (zero, queries, one)
  entry = Range (zero, entries, one)
  lengths = Cast <to = 7> (kv_lengths)
  before = Sub (lengths, queries)
  row_axes = Constant <value = int64[3] {1, 2, 3}> ()
  query_axis = Constant <value = int64[1] {1}> ()
  row_before = Unsqueeze (before, row_axes)
  query_column = Unsqueeze (query, query_axis)
  last = Add (row_before, query_column)
  seen = LessOrEqual (entry, last)
  Y = Attention <scale = 1.0> (Q, K, V, seen)
}
"""
_MASK = """
<domain: "trt", opset_import: ["" : 24]>
TRT_Attention <causal_kind, TRT_decomposable> (Q, K, V, mask, query_lengths, kv_lengths) => (Y)
{
  Y = Attention <scale = 1.0> (Q, K, V, mask)
}
"""


def add_attention_body(proto: Any, kind: str) -> None:
    """Say in the graph itself what ``TRT_Attention`` computes.

    TensorRT's parser knows the operator by name and looks no further; everybody else runs this body. So the same bytes
    are an engine there and can be checked here. A model has one body, and so one kind of attention.
    """
    import onnx

    proto.functions.append(onnx.parser.parse_function(_LOWER_RIGHT if kind == "lower_right" else _MASK))
    if all(opset.domain != "trt" for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("trt", 1))
