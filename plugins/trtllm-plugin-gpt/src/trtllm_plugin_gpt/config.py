"""From a checkpoint's own config to ``ModelConfig`` and this family's extras."""

from __future__ import annotations

from typing import Any, Literal

from trtllm_core.checkpoint.fields import Fields
from trtllm_core.checkpoint.rope import longest_sequence, read_rope
from trtllm_core.config import Config, ModelConfig
from trtllm_core.errors import CheckpointError
from trtllm_core.nn.rotary import RotaryScaling
from trtllm_core.plugin import CheckpointView


class GPTExtras(Config):
    """What only this family needs to know: ``ModelConfig.extras``."""

    intermediate_size: int
    norm_eps: float
    activation: str
    residual: Literal["serial", "parallel", "shared"] = "serial"
    """The MLP reads what attention added to (serial) or what attention read (parallel; shared: by the same norm)."""
    learned_positions: bool = False
    rotary_dim: int = 0
    """Elements of a head that turn with the position."""
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling = RotaryScaling()
    scaled_scores: bool = True
    """Scores are divided by the square root of the head size."""
    scaled_by_layer: bool = False
    """Scores are divided by the layer's number too, from 1 on."""
    attention_bias: bool = True
    tied_head: bool = False
    head_bias: bool = False


def from_hf(checkpoint: CheckpointView) -> ModelConfig:
    """From a Hugging Face ``config.json``.

    Raises:
        CheckpointError: it lacks a field, or asks for what the module does not do.
    """
    fields, kind = Fields(checkpoint, "gpt"), checkpoint.architecture
    heads, hidden = fields.need("n_head", "num_attention_heads"), fields.need("n_embd", "hidden_size")
    usual = 1024 if kind == "GPT2LMHeadModel" else 2048
    positions = fields.get("n_positions", "max_position_embeddings", default=usual)
    special: dict[str, Any] = {
        "GPT2LMHeadModel": _gpt2,
        "GPTJForCausalLM": _gptj,
        "GPTNeoXForCausalLM": _gptneox,
    }[kind](checkpoint, fields, hidden // heads, positions)
    extras = GPTExtras(
        intermediate_size=fields.get("n_inner", "intermediate_size", default=4 * hidden),
        norm_eps=fields.get("layer_norm_epsilon", "layer_norm_eps", default=1e-5),
        **special,
    )
    return ModelConfig(
        family="gpt",
        architecture=kind,
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.need("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=longest_sequence(positions, extras.rope_scaling),
        dtype=fields.dtype,
        extras=extras.model_dump(mode="json"),
    )


def _gpt2(checkpoint: CheckpointView, fields: Fields, head_size: int, positions: int) -> dict[str, Any]:
    if fields.get("add_cross_attention", default=False):
        raise CheckpointError("config.json asks for cross attention, which family 'gpt' does not have")
    return {
        "activation": fields.activation("activation_function", default="gelu_new"),
        "learned_positions": True,
        "scaled_scores": fields.get("scale_attn_weights", default=True),
        "scaled_by_layer": fields.get("scale_attn_by_inverse_layer_idx", default=False),
        "tied_head": _tied(checkpoint, fields, default=True),
    }


def _gptj(checkpoint: CheckpointView, fields: Fields, head_size: int, positions: int) -> dict[str, Any]:
    if _tied(checkpoint, fields, default=False):
        raise CheckpointError("config.json ties GPT-J's head to its embedding, which has no bias as the head has")
    return {
        "activation": fields.activation("activation_function", default="gelu_new"),
        "residual": "shared",
        "rotary_dim": fields.get("rotary_dim", default=64),
        "attention_bias": False,
        "head_bias": True,
    }


def _gptneox(checkpoint: CheckpointView, fields: Fields, head_size: int, positions: int) -> dict[str, Any]:
    rope = read_rope({"rotary_pct": 0.25, **checkpoint.config}, positions)
    return {
        "activation": fields.activation("hidden_act", default="gelu"),
        "residual": "parallel" if fields.get("use_parallel_residual", default=True) else "serial",
        "rotary_dim": int(head_size * rope.fraction),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "attention_bias": fields.get("attention_bias", default=True),
        "tied_head": _tied(checkpoint, fields, default=False),
    }


def _tied(checkpoint: CheckpointView, fields: Fields, default: bool) -> bool:
    """Where a checkpoint has a head of its own after all, that head is the one that was trained."""
    own = {"lm_head.weight", "embed_out.weight"} & checkpoint.names()
    return bool(fields.get("tie_word_embeddings", default=default)) and not own


def from_gguf(checkpoint: CheckpointView) -> ModelConfig:
    """From GGUF metadata, which does not name the activation: it is the one that the originals have.

    Raises:
        CheckpointError: it lacks an entry.
    """
    fields, gpt2 = Fields(checkpoint, "gpt"), checkpoint.architecture == "gpt2"
    heads, hidden = fields.need("attention.head_count"), fields.need("embedding_length")
    serial = gpt2 or not fields.get("use_parallel_residual", default=True)
    extras = GPTExtras(
        intermediate_size=fields.need("feed_forward_length"),
        norm_eps=fields.need("attention.layer_norm_epsilon"),
        activation="gelu_new" if gpt2 else "gelu",
        residual="serial" if serial else "parallel",
        learned_positions=gpt2,
        rotary_dim=0 if gpt2 else fields.get("rope.dimension_count", default=hidden // heads),
        rope_theta=fields.get("rope.freq_base", default=10000.0),
        attention_bias="blk.0.attn_qkv.bias" in checkpoint.names(),
        tied_head="output.weight" not in checkpoint.names(),
    )
    return ModelConfig(
        family="gpt",
        architecture="GPT2LMHeadModel" if gpt2 else "GPTNeoXForCausalLM",
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_layers=fields.need("block_count"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=fields.need("context_length"),
        extras=extras.model_dump(mode="json"),
    )
