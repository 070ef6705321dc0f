"""From a checkpoint's own config to ``ModelConfig`` and this family's extras."""

from __future__ import annotations

from typing import Any

from trtllm_core.checkpoint.fields import Fields
from trtllm_core.checkpoint.rope import longest_sequence, longrope, read_rope
from trtllm_core.config import Config, ModelConfig
from trtllm_core.errors import CheckpointError
from trtllm_core.nn.rotary import RotaryScaling
from trtllm_core.plugin import CheckpointView

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""By the names that GGUF files use."""
_QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


class LlamaExtras(Config):
    """What only this family needs to know: ``ModelConfig.extras``."""

    intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RotaryScaling = RotaryScaling()
    rotary_dim: int | None = None
    """Elements of a head that turn with the position; None: all of them."""
    activation: str = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Each head of q and k is normalised before it turns."""
    windowed_layers: tuple[int, ...] | None = None
    """Layers that have ModelConfig.sliding_window; None: all of them."""


def from_hf(checkpoint: CheckpointView) -> ModelConfig:
    """From a Hugging Face ``config.json``.

    Raises:
        CheckpointError: it lacks a field, or names an activation or a rope scaling that is not known.
    """
    fields, kind = Fields(checkpoint, "llama"), checkpoint.architecture
    heads, hidden, layers = (fields.need(name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    positions = fields.get("max_position_embeddings", default=2048)
    rope = read_rope(checkpoint.config, positions)
    window = fields.get("sliding_window") if _has_window(fields, kind) else None
    head_size = fields.get("head_dim", default=hidden // heads)
    biased = fields.get("attention_bias", default=False) and kind != "Phi3ForCausalLM"
    extras = LlamaExtras(
        intermediate_size=fields.need("intermediate_size"),
        norm_eps=fields.get("rms_norm_eps", default=1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        # Of this family only Phi-3 rotates a part of each head, whatever fields another config may carry along.
        rotary_dim=None if rope.fraction == 1 or kind != "Phi3ForCausalLM" else int(head_size * rope.fraction),
        activation=fields.activation("hidden_act", default="silu"),
        # Where a checkpoint has a head of its own after all, that head is the one that was trained.
        tied_head=fields.get("tie_word_embeddings", default=False) and "lm_head.weight" not in checkpoint.names(),
        qkv_bias=kind == "Qwen2ForCausalLM" or biased,
        output_bias=kind != "Qwen2ForCausalLM" and biased,
        mlp_bias=fields.get("mlp_bias", default=False),
        qk_norm=kind == "Qwen3ForCausalLM",
        windowed_layers=_windowed(fields, layers, kind) if window else None,
    )
    return ModelConfig(
        family="llama",
        architecture=kind,
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", default=heads),
        head_size=head_size,
        max_position_embeddings=longest_sequence(positions, rope.scaling),
        sliding_window=window,
        dtype=fields.dtype,
        extras=extras.model_dump(mode="json"),
    )


def _has_window(fields: Fields, kind: str) -> bool:
    """LLaMA itself has none, whatever fields a converted config may carry along."""
    return kind in ("MistralForCausalLM", "Phi3ForCausalLM") or (
        kind in _QWEN and bool(fields.get("use_sliding_window", default=False))
    )


def _windowed(fields: Fields, layers: int, kind: str) -> tuple[int, ...] | None:
    types = fields.get("layer_types")
    if types:
        return tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return tuple(range(fields.get("max_window_layers", default=layers), layers)) if kind in _QWEN else None


def from_gguf(checkpoint: CheckpointView) -> ModelConfig:
    """From GGUF metadata.

    Raises:
        CheckpointError: it lacks an entry, or names a rope scaling that is not known.
    """
    fields, names = Fields(checkpoint, "llama"), checkpoint.names()
    heads, hidden = fields.need("attention.head_count"), fields.need("embedding_length")
    head_size = fields.get("attention.key_length", default=hidden // heads)
    rotary_dim = fields.get("rope.dimension_count", default=head_size)
    positions, scaling = fields.need("context_length"), _gguf_scaling(checkpoint, fields)
    extras = LlamaExtras(
        intermediate_size=fields.need("feed_forward_length"),
        norm_eps=fields.need("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.get("rope.freq_base", default=10000.0),
        rope_scaling=scaling,
        rotary_dim=None if rotary_dim == head_size else rotary_dim,
        tied_head="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
    )
    return ModelConfig(
        family="llama",
        architecture=_ARCHITECTURES[checkpoint.architecture],
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_layers=fields.need("block_count"),
        num_heads=heads,
        num_kv_heads=fields.get("attention.head_count_kv", default=heads),
        head_size=head_size,
        max_position_embeddings=longest_sequence(positions, scaling),
        sliding_window=fields.get("attention.sliding_window") or None,
        extras=extras.model_dump(mode="json"),
    )


def _gguf_scaling(checkpoint: CheckpointView, fields: Fields) -> RotaryScaling:
    original: Any = fields.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in checkpoint.names():
        return RotaryScaling(kind="factors", factors=tuple(checkpoint.tensor("rope_freqs.weight").tolist()))
    if "rope_factors_long.weight" in checkpoint.names():
        short, long = (checkpoint.tensor(f"rope_factors_{kind}.weight").tolist() for kind in ("short", "long"))
        positions = fields.need("context_length")
        attention_factor = fields.get("rope.scaling.attn_factor")
        return longrope(short, long, original or positions, positions, attention_factor=attention_factor)
    kind = fields.get("rope.scaling.type", default="none")
    if kind == "none":
        return RotaryScaling()
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} of GGUF files is not supported (linear and yarn are)")
    factor = fields.need("rope.scaling.factor")
    return RotaryScaling(kind=kind, factor=factor, original_max_position_embeddings=original)
