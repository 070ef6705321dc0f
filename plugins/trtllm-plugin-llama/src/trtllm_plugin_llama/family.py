"""The family: config, weight map and module."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_core.config import ModelConfig
from trtllm_core.nn import weights as maps
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, Piece, Weight
from trtllm_plugin_llama.config import LlamaExtras, from_gguf, from_hf
from trtllm_plugin_llama.module import LlamaModule

_HF = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": "self_attn.qkv_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_up": "mlp.gate_up_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GGUF = {
    "embedding": "token_embd",
    "head": "output",
    "norm": "output_norm",
    "layer": "blk.{}.",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "qkv": "attn_qkv",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "output": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_up": "ffn_up",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


_UNUSED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class LlamaFamily(ModelFamily):
    """LLaMA 1-3, Mistral, Qwen2, Qwen3, Phi-3, SmolLM2."""

    name = "llama"
    architectures = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    )
    gguf_architectures = ("llama", "phi3", "qwen2", "qwen3")

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """See ``ModelFamily``."""
        return from_hf(checkpoint) if checkpoint.format == "hf" else from_gguf(checkpoint)

    def module(self, config: ModelConfig, parallel: TensorParallel) -> LlamaModule:
        """See ``ModelFamily``."""
        return LlamaModule(config, parallel)

    def unused(self, name: str) -> bool:
        """Rotary tables: the module computes its own, and a GGUF file's factors are in the config."""
        return name.endswith("rotary_emb.inv_freq") or name in _UNUSED

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """See ``ModelFamily``."""
        extras = LlamaExtras(**config.extras)
        names = _HF if checkpoint.format == "hf" else _GGUF
        # llama.cpp rotates neighbouring pairs, so its converter reorders the rows of q and k of this architecture.
        pairs = checkpoint.architecture == "llama"
        out = maps.linear("embedding", names["embedding"], "vocab") + maps.linear("norm", names["norm"])
        if not extras.tied_head:
            out += maps.linear("head", names["head"], "vocab")
        for i in range(config.num_layers):
            parts = {part: names["layer"].format(i) + name for part, name in names.items()}
            out += _layer(f"layers.{i}.", parts, config, extras, pairs)
        return out


def _layer(target: str, parts: dict[str, str], config: ModelConfig, extras: LlamaExtras, pairs: bool) -> list[Weight]:
    """``parts`` are the layer's own names in the checkpoint, as in ``_HF``."""
    fused = config.architecture == "Phi3ForCausalLM"
    qkv = _fused_qkv(parts, config) if fused else _qkv(parts, config, pairs)
    out = [
        *maps.linear(f"{target}attention_norm", parts["attention_norm"]),
        *maps.fused(f"{target}attention.qkv", qkv, bias=extras.qkv_bias),
        *maps.linear(f"{target}attention.output", parts["output"], "columns", bias=extras.output_bias),
        *maps.linear(f"{target}mlp_norm", parts["mlp_norm"]),
        *maps.fused(f"{target}mlp.gate_up", _gate_up(parts, extras, fused), bias=extras.mlp_bias),
        *maps.linear(f"{target}mlp.down", parts["down"], "columns", bias=extras.mlp_bias),
    ]
    if extras.qk_norm:
        out += maps.linear(f"{target}attention.q_norm", parts["q_norm"])
        out += maps.linear(f"{target}attention.k_norm", parts["k_norm"])
    return out


def _qkv(parts: dict[str, str], config: ModelConfig, pairs: bool) -> list[Piece]:
    order = maps.halves(config.head_size) if pairs else None
    return [Piece(parts["q"], "heads", order), Piece(parts["k"], "kv_heads", order), Piece(parts["v"], "kv_heads")]


def _fused_qkv(parts: dict[str, str], config: ModelConfig) -> list[Piece]:
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return [
        Piece(parts["qkv"], "heads", maps.rows(0, q)),
        Piece(parts["qkv"], "kv_heads", maps.rows(q, kv)),
        Piece(parts["qkv"], "kv_heads", maps.rows(q + kv, kv)),
    ]


def _gate_up(parts: dict[str, str], extras: LlamaExtras, fused: bool) -> list[Piece]:
    if not fused:
        return [Piece(parts["gate"], "rows"), Piece(parts["up"], "rows")]
    inner = extras.intermediate_size
    return [Piece(parts["gate_up"], "rows", maps.rows(i * inner, inner)) for i in range(2)]
