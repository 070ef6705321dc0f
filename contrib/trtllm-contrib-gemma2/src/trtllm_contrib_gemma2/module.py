"""The module, written once for every backend and every number of ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm

from trtllm_core.config import Config, ModelConfig
from trtllm_core.nn import (
    Attention,
    AttentionContext,
    GatedMLP,
    Layer,
    QKVLinear,
    RotaryEmbedding,
    RowLinear,
    VocabParallelEmbedding,
)
from trtllm_core.parallel import TensorParallel


class Extras(Config):
    """What only this family needs to know: ``ModelConfig.extras``."""

    intermediate_size: int
    norm_eps: float
    rope_theta: float
    activation: str
    score_scale: float
    score_cap: float | None
    logit_cap: float | None
    windowed_layers: tuple[int, ...]


class Norm(Layer):
    """``x / sqrt(mean(x²) + eps) * (1 + weight)``, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size] ->`` same shape and dtype."""
        return rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class Gemma2Layer(Layer):
    """One decoder layer: attention and MLP, each with a norm before and one after."""

    def __init__(
        self, index: int, config: ModelConfig, extras: Extras, rotary: RotaryEmbedding, parallel: TensorParallel
    ) -> None:
        super().__init__()
        hidden, heads, size = config.hidden_size, config.num_heads, config.head_size
        self.input_layernorm = Norm(hidden, extras.norm_eps)
        self.qkv = QKVLinear(hidden, heads, config.num_kv_heads, size, parallel)
        self.attention = Attention(
            index,
            self.qkv.num_heads,
            self.qkv.num_kv_heads,
            size,
            scale=extras.score_scale,
            sliding_window=config.sliding_window if index in extras.windowed_layers else None,
            softcap=extras.score_cap,
            rotary=rotary,
        )
        self.output = RowLinear(heads * size, hidden, parallel)
        self.post_attention_layernorm = Norm(hidden, extras.norm_eps)
        self.pre_feedforward_layernorm = Norm(hidden, extras.norm_eps)
        self.mlp = GatedMLP(hidden, extras.intermediate_size, extras.activation, parallel)
        self.post_feedforward_layernorm = Norm(hidden, extras.norm_eps)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape."""
        qkv = self.qkv(self.input_layernorm(x)).unflatten(-1, (-1, self.qkv.head_size))
        x = x + self.post_attention_layernorm(self.output(self.attention(qkv, context)))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x


class Gemma2Module(Layer):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        extras = Extras(**config.extras)
        self.logit_cap = extras.logit_cap
        scale = config.hidden_size**0.5
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel, scale)
        rotary = RotaryEmbedding(config.head_size, extras.rope_theta, config.max_position_embeddings)
        self.layers = nn.ModuleList(Gemma2Layer(i, config, extras, rotary, parallel) for i in range(config.num_layers))
        self.norm = Norm(config.hidden_size, extras.norm_eps)

    def forward(self, input_ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """``input_ids [...] -> [..., hidden_size]``, normalised, ready for ``logits``."""
        x: torch.Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, context)
        x = self.norm(x)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size] -> [..., vocab_size_padded]``, the embedding being the head."""
        logits = self.embedding.logits(hidden)
        if self.logit_cap is None:
            return logits
        return self.logit_cap * torch.tanh(logits / self.logit_cap)
