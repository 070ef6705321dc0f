"""The module: written once, for every backend and every number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.config import ModelConfig
from trtllm_core.nn import (
    MLP,
    Attention,
    AttentionContext,
    Layer,
    LayerNorm,
    LMHead,
    PositionEmbedding,
    QKVLinear,
    RotaryEmbedding,
    RowLinear,
    VocabParallelEmbedding,
)
from trtllm_core.parallel import TensorParallel
from trtllm_plugin_gpt.config import GPTExtras


class GPTAttention(Layer):
    """Multi-head attention, with rotary positions or none."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        extras: GPTExtras,
        rotary: RotaryEmbedding | None,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        heads, size = config.num_heads, config.head_size
        self.qkv = QKVLinear(config.hidden_size, heads, heads, size, parallel, extras.attention_bias)
        self.output = RowLinear(heads * size, config.hidden_size, parallel, extras.attention_bias)
        scale = (size**-0.5 if extras.scaled_scores else 1.0) / (index + 1 if extras.scaled_by_layer else 1)
        self.attention = Attention(index, self.qkv.num_heads, self.qkv.num_kv_heads, size, scale=scale, rotary=rotary)

    def forward(self, x: torch.Tensor, context: AttentionContext, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape, plus ``residual``: see ``RowLinear``."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.qkv.head_size))
        return self.output(self.attention(qkv, context), residual)  # type: ignore[no-any-return]


class GPTLayer(Layer):
    """One decoder layer."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        extras: GPTExtras,
        rotary: RotaryEmbedding | None,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        self.serial = extras.residual == "serial"
        self.attention_norm = LayerNorm(config.hidden_size, extras.norm_eps)
        self.attention = GPTAttention(index, config, extras, rotary, parallel)
        self.mlp_norm = None if extras.residual == "shared" else LayerNorm(config.hidden_size, extras.norm_eps)
        self.mlp = MLP(config.hidden_size, extras.intermediate_size, extras.activation, parallel, bias=True)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape."""
        normal = beside = self.attention_norm(x)
        if self.mlp_norm is not None and not self.serial:
            beside = self.mlp_norm(x)  # before the residual is given away
        x = self.attention(normal, context, x)
        if self.mlp_norm is not None and self.serial:
            beside = self.mlp_norm(x)
        return self.mlp(beside, x)  # type: ignore[no-any-return]


class GPTModule(Layer):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        extras, hidden = GPTExtras(**config.extras), config.hidden_size
        self.embedding = VocabParallelEmbedding(config.vocab_size, hidden, parallel)
        self.positions = PositionEmbedding(config.max_position_embeddings, hidden) if extras.learned_positions else None
        rotary = None
        if extras.rotary_dim:
            rotary = RotaryEmbedding(
                extras.rotary_dim, extras.rope_theta, config.max_position_embeddings, extras.rope_scaling
            )
        self.layers = nn.ModuleList(GPTLayer(i, config, extras, rotary, parallel) for i in range(config.num_layers))
        self.norm = LayerNorm(hidden, extras.norm_eps)
        self.head = None if extras.tied_head else LMHead(config.vocab_size, hidden, parallel, extras.head_bias)

    def forward(self, input_ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``input_ids [...] -> [..., hidden_size]``, normalised, ready for ``logits``."""
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(context.positions)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [..., hidden_size] -> [..., vocab_size_padded]``, the same on every rank."""
        if self.head is None:
            return self.embedding.logits(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]
