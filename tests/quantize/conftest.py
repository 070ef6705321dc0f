"""Tiny checkpoints whose sizes groups of 32 divide."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from trtllm_core.plugin import Plugins
from trtllm_core.testing.checkpoints import write_llama

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own."""
    return write_llama(tmp_path_factory.mktemp("hf"), **SIZES)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose embedding's table is the head."""
    return write_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, **SIZES)


@pytest.fixture(scope="session")
def quantised_gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a GGUF: Q4_1 and Q4_0 in turn, queries and keys alike, and the head in Q8_0."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    for i, (name, value) in enumerate(sorted(load_file(checkpoint / "model.safetensors").items())):
        renamed = name
        for old, new in names.items():
            renamed = renamed.replace(old, new)
        if value.ndim == 1:
            writer.add_tensor(renamed, value)
            continue
        kind = gguf.GGMLQuantizationType["Q8_0" if "head" in name else ("Q4_0", "Q4_1")[i % 2]]
        raw = gguf.quants.quantize(value.astype(np.float32), kind)
        writer.add_tensor(renamed, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
