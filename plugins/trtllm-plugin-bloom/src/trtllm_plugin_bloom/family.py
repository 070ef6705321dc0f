"""The family: config, weight map and module."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_core.config import ModelConfig
from trtllm_core.nn.weights import fused, linear, of_each_head, rows
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, Piece, Weight
from trtllm_plugin_bloom.config import BloomExtras, from_gguf, from_hf
from trtllm_plugin_bloom.module import BloomModule

_HF = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "norm": "ln_f",
    "layer": "h.{}.",
    "attention_norm": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "output": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_GGUF = {
    "embedding": "token_embd",
    "embedding_norm": "token_embd_norm",
    "norm": "output_norm",
    "layer": "blk.{}.",
    "attention_norm": "attn_norm",
    "qkv": "attn_qkv",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "up": "ffn_up",
    "down": "ffn_down",
}


class BloomFamily(ModelFamily):
    """BLOOM, BLOOMZ."""

    name = "bloom"
    architectures = ("BloomForCausalLM",)
    gguf_architectures = ("bloom",)

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """See ``ModelFamily``."""
        return from_hf(checkpoint) if checkpoint.format == "hf" else from_gguf(checkpoint)

    def module(self, config: ModelConfig, parallel: TensorParallel) -> BloomModule:
        """See ``ModelFamily``."""
        return BloomModule(config, parallel)

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """See ``ModelFamily``."""
        extras, gguf = BloomExtras(**config.extras), checkpoint.format == "gguf"
        # The published checkpoints are of the model below the head; those that transformers saves are of the whole.
        whole = "transformer.word_embeddings.weight" in checkpoint.names()
        names = {part: ("transformer." if whole else "") + name for part, name in (_GGUF if gguf else _HF).items()}
        out = [
            *linear("embedding", names["embedding"], "vocab"),
            *linear("embedding_norm", names["embedding_norm"], bias=True),
            *linear("norm", names["norm"], bias=True),
        ]
        if not extras.tied_head:
            out += linear("head", "output" if gguf else "lm_head", "vocab")
        for i in range(config.num_layers):
            out += _layer(f"layers.{i}.", names["layer"].format(i), _GGUF if gguf else _HF, config)
        return out


def _layer(target: str, source: str, names: dict[str, str], config: ModelConfig) -> list[Weight]:
    def part(index: int) -> Piece:
        if names is _GGUF:  # llama.cpp's converter puts q before k before v
            take = rows(index * config.hidden_size, config.hidden_size)
        else:
            take = of_each_head(index, 3, config.head_size)
        return Piece(source + names["qkv"], "kv_heads" if index else "heads", take)

    return [
        *linear(f"{target}attention_norm", source + names["attention_norm"], bias=True),
        *fused(f"{target}attention.qkv", [part(0), part(1), part(2)], bias=True),
        *linear(f"{target}attention.output", source + names["output"], "columns", bias=True),
        *linear(f"{target}mlp_norm", source + names["mlp_norm"], bias=True),
        *linear(f"{target}mlp.up", source + names["up"], "rows", bias=True),
        *linear(f"{target}mlp.down", source + names["down"], "columns", bias=True),
    ]
