"""The module: written once, for every backend and every number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.config import ModelConfig
from trtllm_core.nn import (
    Attention,
    AttentionContext,
    GatedMLP,
    Layer,
    LMHead,
    QKVLinear,
    RMSNorm,
    RotaryEmbedding,
    RowLinear,
    VocabParallelEmbedding,
)
from trtllm_core.parallel import TensorParallel
from trtllm_plugin_llama.config import LlamaExtras


class LlamaAttention(Layer):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, index: int, config: ModelConfig, extras: LlamaExtras, rotary: RotaryEmbedding, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.qkv = QKVLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size, parallel, extras.qkv_bias
        )
        self.output = RowLinear(config.num_heads * config.head_size, config.hidden_size, parallel, extras.output_bias)
        windowed = extras.windowed_layers is None or index in extras.windowed_layers
        self.attention = Attention(
            index,
            self.qkv.num_heads,
            self.qkv.num_kv_heads,
            config.head_size,
            sliding_window=config.sliding_window if windowed else None,
            rotary=rotary,
        )
        self.q_norm = RMSNorm(config.head_size, extras.norm_eps) if extras.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, extras.norm_eps) if extras.qk_norm else None

    def forward(self, x: torch.Tensor, context: AttentionContext, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape, plus ``residual``: see ``RowLinear``."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.qkv.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((self.qkv.num_heads, self.qkv.num_kv_heads, self.qkv.num_kv_heads), dim=-2)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-2)
        return self.output(self.attention(qkv, context), residual)  # type: ignore[no-any-return]


class LlamaLayer(Layer):
    """One decoder layer."""

    def __init__(
        self, index: int, config: ModelConfig, extras: LlamaExtras, rotary: RotaryEmbedding, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, extras.norm_eps)
        self.attention = LlamaAttention(index, config, extras, rotary, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, extras.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, extras.intermediate_size, extras.activation, parallel, extras.mlp_bias)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape."""
        x = self.attention(self.attention_norm(x), context, x)
        return self.mlp(self.mlp_norm(x), x)  # type: ignore[no-any-return]


class LlamaModule(Layer):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        extras = LlamaExtras(**config.extras)
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel)
        rotary = RotaryEmbedding(
            extras.rotary_dim or config.head_size,
            extras.rope_theta,
            config.max_position_embeddings,
            extras.rope_scaling,
        )
        self.layers = nn.ModuleList(LlamaLayer(i, config, extras, rotary, parallel) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, extras.norm_eps)
        self.head = None if extras.tied_head else LMHead(config.vocab_size, config.hidden_size, parallel)

    def forward(self, input_ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``input_ids [...] -> [..., hidden_size]``, normalised, ready for ``logits``."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [..., hidden_size] -> [..., vocab_size_padded]``, the same on every rank."""
        if self.head is None:
            return self.embedding.logits(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]
