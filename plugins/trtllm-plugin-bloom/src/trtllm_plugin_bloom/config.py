"""From a checkpoint's own config to ``ModelConfig`` and this family's extras."""

from __future__ import annotations

from trtllm_core.checkpoint.fields import Fields
from trtllm_core.config import Config, ModelConfig
from trtllm_core.plugin import CheckpointView

_POSITIONS = 2048
"""Tokens of BLOOM's training sequences. ALiBi knows no limit, so that a config need not name one."""


class BloomExtras(Config):
    """What only this family needs to know: ``ModelConfig.extras``."""

    intermediate_size: int
    norm_eps: float
    tied_head: bool = True
    normalised_residual: bool = False
    """What attention and MLP are added to is what they read, after its norm, not before."""


def from_hf(checkpoint: CheckpointView) -> ModelConfig:
    """From a Hugging Face ``config.json``.

    Raises:
        CheckpointError: it lacks a field.
    """
    fields = Fields(checkpoint, "bloom")
    heads, hidden = fields.need("n_head", "num_attention_heads"), fields.need("hidden_size", "n_embed")
    tied = fields.get("tie_word_embeddings", default=True)
    extras = BloomExtras(
        intermediate_size=4 * hidden,
        norm_eps=fields.get("layer_norm_epsilon", default=1e-5),
        # Where a checkpoint has a head of its own after all, that head is the one that was trained.
        tied_head=tied and "lm_head.weight" not in checkpoint.names(),
        normalised_residual=fields.get("apply_residual_connection_post_layernorm", default=False),
    )
    return ModelConfig(
        family="bloom",
        architecture=checkpoint.architecture,
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.need("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=fields.get("seq_length", default=_POSITIONS),
        dtype=fields.dtype,
        extras=extras.model_dump(mode="json"),
    )


def from_gguf(checkpoint: CheckpointView) -> ModelConfig:
    """From GGUF metadata.

    Raises:
        CheckpointError: it lacks an entry.
    """
    fields = Fields(checkpoint, "bloom")
    heads, hidden = fields.need("attention.head_count"), fields.need("embedding_length")
    extras = BloomExtras(
        intermediate_size=fields.need("feed_forward_length"),
        norm_eps=fields.need("attention.layer_norm_epsilon"),
        tied_head="output.weight" not in checkpoint.names(),
    )
    return ModelConfig(
        family="bloom",
        architecture="BloomForCausalLM",
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_layers=fields.need("block_count"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=fields.get("context_length", default=_POSITIONS),
        extras=extras.model_dump(mode="json"),
    )
