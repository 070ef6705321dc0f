"""The family: what a checkpoint's config says, and where its weights go."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_contrib_gemma2.module import Extras, Gemma2Module
from trtllm_core.config import ModelConfig
from trtllm_core.errors import CheckpointError
from trtllm_core.nn.weights import fused, linear
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, Piece, Weight

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Gemma2Family(ModelFamily):
    """Gemma 2."""

    name = "gemma2"
    architectures = ("Gemma2ForCausalLM",)

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """See ``ModelFamily``."""
        c = checkpoint.config
        rope = c.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"rope scaling {rope['rope_type']!r} is not supported by family 'gemma2'")
        layers = c["num_hidden_layers"]
        types = c.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        extras = Extras(
            intermediate_size=c["intermediate_size"],
            norm_eps=c["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
            activation=c.get("hidden_activation") or "gelu_pytorch_tanh",
            score_scale=c["query_pre_attn_scalar"] ** -0.5,
            score_cap=c.get("attn_logit_softcapping"),
            logit_cap=c.get("final_logit_softcapping"),
            windowed_layers=tuple(i for i, kind in enumerate(types) if kind == "sliding_attention"),
        )
        return ModelConfig(
            family=self.name,
            architecture=checkpoint.architecture,
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            num_layers=layers,
            num_heads=c["num_attention_heads"],
            num_kv_heads=c["num_key_value_heads"],
            head_size=c["head_dim"],
            max_position_embeddings=c["max_position_embeddings"],
            sliding_window=c["sliding_window"],
            dtype=c.get("dtype") or c.get("torch_dtype") or "float32",
            extras=extras.model_dump(mode="json"),
        )

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """See ``ModelFamily``."""
        out = [*linear("embedding", "model.embed_tokens", "vocab"), *linear("norm", "model.norm")]
        for i in range(config.num_layers):
            source, target = f"model.layers.{i}.", f"layers.{i}."
            attention, mlp = f"{source}self_attn.", f"{source}mlp."
            keys_and_values = (Piece(f"{attention}{name}_proj", "kv_heads") for name in "kv")
            out += [weight for name in NORMS for weight in linear(f"{target}{name}", f"{source}{name}")]
            out += [
                *fused(f"{target}qkv", [Piece(f"{attention}q_proj", "heads"), *keys_and_values]),
                *linear(f"{target}output", f"{attention}o_proj", "columns"),
                *fused(f"{target}mlp.gate_up", [Piece(f"{mlp}{name}_proj", "rows") for name in ("gate", "up")]),
                *linear(f"{target}mlp.down", f"{mlp}down_proj", "columns"),
            ]
        return out

    def module(self, config: ModelConfig, parallel: TensorParallel) -> Gemma2Module:
        """See ``ModelFamily``."""
        return Gemma2Module(config, parallel)
