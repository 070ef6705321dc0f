"""The family: config, weight map and module."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trtllm_core.config import ModelConfig
from trtllm_core.nn.weights import fused, linear
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, Weight
from trtllm_plugin_gpt.config import GPTExtras, from_gguf, from_hf
from trtllm_plugin_gpt.layouts import Layout, layout_of
from trtllm_plugin_gpt.module import GPTModule

# Causal masks and rotary tables, which old checkpoints carry along: the attention layer has its own.
_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)$")


class GPTFamily(ModelFamily):
    """GPT-2, GPT-J, GPT-NeoX, Pythia."""

    name = "gpt"
    architectures = ("GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM")
    gguf_architectures = ("gpt2", "gptneox")

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """See ``ModelFamily``."""
        return from_hf(checkpoint) if checkpoint.format == "hf" else from_gguf(checkpoint)

    def module(self, config: ModelConfig, parallel: TensorParallel) -> GPTModule:
        """See ``ModelFamily``."""
        return GPTModule(config, parallel)

    def unused(self, name: str) -> bool:
        """Causal masks and rotary tables."""
        return _BUFFERS.search(name) is not None

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """See ``ModelFamily``."""
        extras, layout, names = GPTExtras(**config.extras), layout_of(checkpoint), checkpoint.names()
        prefix = layout.prefix if f"{layout.prefix}{layout.embedding}.weight" in names else ""
        out = linear("embedding", prefix + layout.embedding, "vocab")
        if extras.learned_positions:
            out += linear("positions", prefix + layout.positions)
        for i in range(config.num_layers):
            out += _layer(f"layers.{i}.", prefix + layout.layer.format(i), layout, config, extras)
        out += linear("norm", prefix + layout.norm, bias=True)
        if not extras.tied_head:
            head = next((name for name in layout.heads if f"{name}.weight" in names), layout.heads[0])
            out += linear("head", head, "vocab", bias=extras.head_bias)
        return out


def _layer(target: str, source: str, layout: Layout, config: ModelConfig, extras: GPTExtras) -> list[Weight]:
    biased, order = extras.attention_bias, layout.transform
    out = [
        *linear(f"{target}attention_norm", source + layout.attention_norm, bias=True),
        *fused(f"{target}attention.qkv", layout.qkv(source, config), bias=biased),
        *linear(f"{target}attention.output", source + layout.output, "columns", bias=biased, transform=order),
        *linear(f"{target}mlp.up", source + layout.up, "rows", bias=True, transform=order),
        *linear(f"{target}mlp.down", source + layout.down, "columns", bias=True, transform=order),
    ]
    if extras.residual != "shared":
        out += linear(f"{target}mlp_norm", source + layout.mlp_norm, bias=True)
    return out
