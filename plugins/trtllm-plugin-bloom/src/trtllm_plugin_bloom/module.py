"""The module: written once, for every backend and every number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.config import ModelConfig
from trtllm_core.nn import (
    MLP,
    Alibi,
    Attention,
    AttentionContext,
    Layer,
    LayerNorm,
    LMHead,
    QKVLinear,
    RowLinear,
    VocabParallelEmbedding,
)
from trtllm_core.parallel import TensorParallel
from trtllm_plugin_bloom.config import BloomExtras


class BloomAttention(Layer):
    """Multi-head attention whose scores fall with distance."""

    def __init__(self, index: int, config: ModelConfig, alibi: Alibi, parallel: TensorParallel) -> None:
        super().__init__()
        heads, size = config.num_heads, config.head_size
        self.qkv = QKVLinear(config.hidden_size, heads, heads, size, parallel, bias=True)
        self.output = RowLinear(heads * size, config.hidden_size, parallel, bias=True)
        self.attention = Attention(index, self.qkv.num_heads, self.qkv.num_kv_heads, size, alibi=alibi)

    def forward(self, x: torch.Tensor, context: AttentionContext, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape, plus ``residual``: see ``RowLinear``."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.qkv.head_size))
        return self.output(self.attention(qkv, context), residual)  # type: ignore[no-any-return]


class BloomLayer(Layer):
    """One decoder layer."""

    def __init__(
        self, index: int, config: ModelConfig, extras: BloomExtras, alibi: Alibi, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.normalised_residual = extras.normalised_residual
        self.attention_norm = LayerNorm(config.hidden_size, extras.norm_eps)
        self.attention = BloomAttention(index, config, alibi, parallel)
        self.mlp_norm = LayerNorm(config.hidden_size, extras.norm_eps)
        self.mlp = MLP(config.hidden_size, extras.intermediate_size, "gelu_new", parallel, bias=True)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape."""
        normal = self.attention_norm(x)
        x = self.attention(normal, context, normal if self.normalised_residual else x)
        normal = self.mlp_norm(x)
        return self.mlp(normal, normal if self.normalised_residual else x)  # type: ignore[no-any-return]


class BloomModule(Layer):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        extras, hidden = BloomExtras(**config.extras), config.hidden_size
        self.embedding = VocabParallelEmbedding(config.vocab_size, hidden, parallel)
        self.embedding_norm = LayerNorm(hidden, extras.norm_eps)
        alibi = Alibi(config.num_heads, parallel)
        self.layers = nn.ModuleList(BloomLayer(i, config, extras, alibi, parallel) for i in range(config.num_layers))
        self.norm = LayerNorm(hidden, extras.norm_eps)
        self.head = None if extras.tied_head else LMHead(config.vocab_size, hidden, parallel)

    def forward(self, input_ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``input_ids [...] -> [..., hidden_size]``, normalised, ready for ``logits``."""
        x = self.embedding_norm(self.embedding(input_ids))
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [..., hidden_size] -> [..., vocab_size_padded]``, the same on every rank."""
        if self.head is None:
            return self.embedding.logits(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]
