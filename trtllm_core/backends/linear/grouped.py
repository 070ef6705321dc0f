"""ONNX Runtime's own operators in exported graphs: rotation, cache and attention in one node, residual and norm in one.

A step of a small model is hundreds of nodes, most of which compute for less time than it takes to start them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trtllm_core.backends.linear.ops import attention_masked, kv_update, rotary

MICROSOFT = "com.microsoft"


@torch.library.custom_op("trtllm_core::grouped_attention", mutates_args=())
def grouped_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    last: torch.Tensor,
    longest: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a cache that they are written to first.

    Args:
        qkv: ``[batch, tokens, heads + 2 * kv_heads, d]``: queries, keys and values, not yet rotated.
        key_cache: ``[batch, kv_heads, entries, d]``, and ``value_cache`` likewise.
        value_cache: see ``key_cache``.
        last: int32 ``[batch]``: the entry that each row's last token is written to.
        longest: int32, no dimension: ``last.max() + 1``.
        cos: ``[positions, dim / 2]``, for the first ``dim`` elements of a head; None: nothing is rotated.
        sin: as ``cos``.
        scale: of the scores.
        window: how many entries a token sees, its own included; -1: all.
        softcap: of the scores; 0: none.

    Returns:
        ``[batch, tokens, heads * d]`` and the two caches, updated.
    """
    tokens, kv = qkv.shape[1], key_cache.shape[1]
    write = last.long() - (tokens - 1)
    positions = write[:, None] + torch.arange(tokens, device=qkv.device)
    qkv = qkv.transpose(1, 2)
    q, k, v = qkv[:, : -2 * kv], qkv[:, -2 * kv : -kv], qkv[:, -kv:]
    if cos is not None and sin is not None:
        q, k = (rotary(x, cos, sin, positions, 2 * cos.shape[1]) for x in (q, k))
    keys, values = kv_update(key_cache, k, write), kv_update(value_cache, v, write)
    offset = torch.arange(keys.shape[2], device=qkv.device) - positions[:, :, None]
    seen = offset <= 0 if window < 0 else (offset <= 0) & (offset > -window)
    out = attention_masked(q * scale, keys, values, seen.unsqueeze(1), softcap)
    return out.transpose(1, 2).flatten(2).contiguous(), keys, values


@grouped_attention.register_fake
def _(
    qkv: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = qkv.shape[2] - 2 * key_cache.shape[1]
    out = qkv.new_empty(*qkv.shape[:2], heads * qkv.shape[3])
    return out, torch.empty_like(key_cache), torch.empty_like(value_cache)


def group_query_attention() -> Callable[..., Any]:
    """The translation of ``grouped_attention``. The operator takes queries, keys and values side by side."""
    import onnxscript

    _register_group_query_attention()
    op: Any = onnxscript.values.Opset("", 24)
    microsoft: Any = onnxscript.values.Opset(MICROSOFT, 1)

    def translate(
        qkv: Any,
        key_cache: Any,
        value_cache: Any,
        last: Any,
        longest: Any,
        cos: Any,
        sin: Any,
        scale: float,
        window: int,
        softcap: float,
    ) -> tuple[Any, ...]:
        heads, kv = int(qkv.shape[2]), int(key_cache.shape[1])
        joined = op.Reshape(qkv, op.Constant(value_ints=[0, 0, heads * int(qkv.shape[3])]))
        inputs = (joined, None, None, key_cache, value_cache, last, longest)
        return tuple(
            microsoft.GroupQueryAttention(
                *(inputs if cos is None else (*inputs, cos, sin)),
                num_heads=heads - 2 * kv,
                kv_num_heads=kv,
                do_rotary=int(cos is not None),
                scale=scale,
                local_window_size=window,
                softcap=softcap,
            )
        )

    return translate


def _register_group_query_attention() -> None:
    """Tell ONNX the schema, as far as graphs here use it."""
    import onnx

    if onnx.defs.has("GroupQueryAttention", MICROSOFT):
        return
    schema = onnx.defs.OpSchema
    parameter, attribute = schema.FormalParameter, schema.Attribute
    optional = schema.FormalParameterOption.Optional
    floats, whole = ("query", "key", "value", "past_key", "past_value"), ("seqlens_k", "total_sequence_length")
    onnx.defs.register_schema(
        schema(
            "GroupQueryAttention",
            MICROSOFT,
            1,
            inputs=[
                *(parameter(name, "T", param_option=optional) for name in floats),
                *(parameter(name, "M") for name in whole),
                *(parameter(name, "T", param_option=optional) for name in ("cos_cache", "sin_cache")),
            ],
            outputs=[parameter(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int32)"], "")],
            attributes=[
                *(
                    attribute(name, schema.AttrType.INT, required=False)
                    for name in ("num_heads", "kv_num_heads", "do_rotary", "local_window_size")
                ),
                *(attribute(name, schema.AttrType.FLOAT, required=False) for name in ("scale", "softcap")),
            ],
        )
    )


def fuse_residuals(model: Any) -> None:
    """Make one node of a sum of two streams and the RMS norm of it; the sum stays, as the next residual.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir

    for norm in list(model.graph):
        if norm.op_type != "RMSNormalization":
            continue
        add = norm.inputs[0].producer()
        if add is None or add.op_type != "Add" or not _same_shape(add.inputs):
            continue
        node = onnx_ir.Node(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            [onnx_ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
            num_outputs=4,
            name=f"{norm.name}_with_residual",
        )
        for old, new in ((norm.outputs[0], node.outputs[0]), (add.outputs[0], node.outputs[3])):
            new.shape, new.type, new.name = old.shape, old.type, old.name
        node.outputs[1].name = node.outputs[2].name = ""  # not wanted
        model.graph.insert_after(add, node)
        for old, new in ((norm.outputs[0], node.outputs[0]), (add.outputs[0], node.outputs[3])):
            old.replace_all_uses_with(new)
        model.graph.remove([norm, add], safe=True)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)


def _same_shape(values: Sequence[Any]) -> bool:
    a, b = (value.shape for value in values)
    return a is not None and a == b and all(value.producer() is not None for value in values)
