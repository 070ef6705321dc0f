"""The layers that model families are written with: tensor-parallel, and blind to the tensor contract they run under.

A family's module offers ``forward(input_ids, context) -> hidden`` and ``logits(hidden) -> logits``. ``context`` is an
``AttentionContext``: it knows the positions of the tokens and where their keys and values live. The same module runs
packed and paged, padded and linear, or traced for export, because only ``Attention`` talks to the context; rotary
embeddings and ALiBi are handed to the attention layers, which leave them to the context.
"""

from trtllm_core.nn.alibi import Alibi, alibi_slopes
from trtllm_core.nn.attention import Attention, AttentionContext
from trtllm_core.nn.embedding import LMHead, PositionEmbedding, VocabParallelEmbedding
from trtllm_core.nn.layer import Layer
from trtllm_core.nn.linear import ColumnLinear, Linear, QKVLinear, RowLinear
from trtllm_core.nn.mlp import MLP, GatedMLP
from trtllm_core.nn.norm import LayerNorm, RMSNorm
from trtllm_core.nn.rotary import RotaryEmbedding, rotate_

__all__ = [
    "MLP",
    "Alibi",
    "Attention",
    "AttentionContext",
    "ColumnLinear",
    "GatedMLP",
    "LMHead",
    "Layer",
    "LayerNorm",
    "Linear",
    "PositionEmbedding",
    "QKVLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowLinear",
    "VocabParallelEmbedding",
    "alibi_slopes",
    "rotate_",
]
