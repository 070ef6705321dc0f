"""The family: config, weight map and module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtllm_core.config import ModelConfig
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
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
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
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


class LlamaFamily(ModelFamily):
    """LLaMA 1-3, Mistral, Qwen2, SmolLM2."""

    name = "llama"
    architectures = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
    gguf_architectures = ("llama", "qwen2")

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """See ``ModelFamily``."""
        return from_hf(checkpoint) if checkpoint.format == "hf" else from_gguf(checkpoint)

    def module(self, config: ModelConfig, parallel: TensorParallel) -> LlamaModule:
        """See ``ModelFamily``."""
        return LlamaModule(config, parallel)

    def unused(self, name: str) -> bool:
        """Rotary tables: the module computes its own."""
        return name.endswith("rotary_emb.inv_freq") or name == "rope_freqs.weight"

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """See ``ModelFamily``."""
        extras = LlamaExtras(**config.extras)
        names = _HF if checkpoint.format == "hf" else _GGUF
        # llama.cpp rotates neighbouring pairs, so its converter reorders the rows of q and k of this architecture.
        pairs = checkpoint.architecture == "llama"
        out = [
            Weight("embedding.weight", (Piece(f"{names['embedding']}.weight", "vocab"),)),
            Weight("norm.weight", (Piece(f"{names['norm']}.weight"),)),
        ]
        if not extras.tied_head:
            out.append(Weight("head.weight", (Piece(f"{names['head']}.weight", "vocab"),)))
        for i in range(config.num_layers):
            out += _layer(i, names, extras, config.head_size if pairs else None)
        return out


def _layer(index: int, names: dict[str, str], extras: LlamaExtras, pairs: int | None) -> list[Weight]:
    source, target = names["layer"].format(index), f"layers.{index}."

    def halves(weight: torch.Tensor) -> torch.Tensor:
        assert pairs is not None
        return weight.view(-1, pairs // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    def qkv(what: str) -> Weight:
        order = halves if pairs else None
        return Weight(
            f"{target}attention.qkv.{what}",
            (
                Piece(f"{source}{names['q']}.{what}", "heads", order),
                Piece(f"{source}{names['k']}.{what}", "kv_heads", order),
                Piece(f"{source}{names['v']}.{what}", "kv_heads"),
            ),
        )

    def gate_up(what: str) -> Weight:
        pieces = tuple(Piece(f"{source}{names[part]}.{what}", "rows") for part in ("gate", "up"))
        return Weight(f"{target}mlp.gate_up.{what}", pieces)

    def one(name: str, part: str, shard: str = "whole") -> Weight:
        return Weight(target + name, (Piece(f"{source}{names[part]}.{name.rsplit('.', 1)[1]}", shard),))  # type: ignore[arg-type]

    out = [
        one("attention_norm.weight", "attention_norm"),
        qkv("weight"),
        one("attention.output.weight", "output", "columns"),
        one("mlp_norm.weight", "mlp_norm"),
        gate_up("weight"),
        one("mlp.down.weight", "down", "columns"),
    ]
    if extras.qkv_bias:
        out.append(qkv("bias"))
    if extras.output_bias:
        out.append(one("attention.output.bias", "output"))
    if extras.mlp_bias:
        out += [gate_up("bias"), one("mlp.down.bias", "down")]
    return out
