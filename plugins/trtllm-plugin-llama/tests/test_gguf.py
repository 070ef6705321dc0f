"""GGUF files of the same weights give the logits of the Hugging Face directory; so does a real file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import CheckpointError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.adapters import AdaptedModel, adapted_logits
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS, distance
from trtllm_plugin_llama.family import LlamaFamily

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a head's rows: partners of a rotation (i, i + d/2) become neighbours (2i, 2i + 1)."""
    rows = weight.view(heads, 2, -1, *weight.shape[1:])
    return torch.stack((rows[:, 0], rows[:, 1]), dim=2).reshape(weight.shape)


def write(model: Any, path: Path, kind: str, permute: bool = True, **extra: Any) -> Path:
    """Write transformers' model as llama.cpp's converter does, in float32."""
    c = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(value)
    tensors = dict(model.state_dict())
    if c.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        if permute and ("q_proj" in name or "k_proj" in name):
            tensor = pairs(tensor, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.numpy())
    if c.rope_parameters["rope_type"] == "llama3":
        plain = c.rope_parameters["rope_theta"] ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    if c.rope_parameters["rope_type"] == "longrope":
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.float32(c.rope_parameters[f"{kind}_factor"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROPE = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, **ROPE}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.2, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    **ROPE,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gqa": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "head_dim": ("llama", {"head_dim": 24}, {"key_length": 24}),
    "rope_freqs": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}, {}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}},
        {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 3.0},
    ),
    "yarn": (
        "llama",
        {"rope_parameters": YARN},
        {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": 4.0,
            "rope_scaling_orig_ctx_len": 24,
        },
    ),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {"key_length": 24}),
    "phi3": ("phi3", {"sliding_window": 10}, {"sliding_window": 10}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **ROPE}},
        {"rope_dimension_count": 8},
    ),
    "phi3-long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        {"rope_scaling_orig_ctx_len": 24},
    ),
}


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins) -> Callable[[Path], Session]:
    def build_and_load(path: Path) -> Session:
        build_engine(path, tmp_path / "engine", plugins=plugins)
        return Session.from_directory(tmp_path / "engine", plugins=plugins)

    return build_and_load


@pytest.mark.parametrize("case", CASES)
def test_same_weights(case: str, tiny: Any, load: Callable[[Path], Session], tmp_path: Path) -> None:
    kind, changes, extra = CASES[case]
    model = tiny(kind, **changes)
    session = load(write(model.model, tmp_path / "model.gguf", kind, permute=kind == "llama", **extra))
    assert model.off(prefill_and_decode(session, model.prompts, STEPS)) < 1e-4


@pytest.mark.parametrize("case", ["gqa", "qwen2", "phi3"])
def test_adapters_of_the_same_model(case: str, tiny: Any, tmp_path: Path, plugins: Plugins) -> None:
    """A file's rows stand in llama.cpp's order and under its names; PEFT adapters find their places all the same."""
    pytest.importorskip("peft")
    kind, changes, extra = CASES[case]
    model = tiny(kind, **changes)
    source = write(model.model, tmp_path / "model.gguf", kind, permute=kind == "llama", **extra)
    build_engine(source, tmp_path / "engine", BuildConfig(max_lora_rank=4), plugins=plugins)
    adapted = AdaptedModel(model.model, tmp_path)
    path = adapted.add("0", "all-linear")
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    prompts = [ids[:30] for ids in model.prompts[:3]]
    ours = adapted_logits(session, plugins, [path], [0, -1, 0], prompts, 4)
    expected = [adapted.logits(name, ids) for name, ids in zip(("0", None, "0"), prompts, strict=True)]
    assert distance(ours, expected) < 1e-4


@pytest.mark.parametrize(("kind", "permute"), [("llama", False), ("qwen2", True)])
def test_a_wrong_order_of_rows_shows(
    kind: str, permute: bool, tiny: Any, load: Callable[[Path], Session], tmp_path: Path
) -> None:
    model = tiny(kind)
    session = load(write(model.model, tmp_path / "model.gguf", kind, permute))
    assert model.off(prefill_and_decode(session, model.prompts, STEPS)) > 1e-2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "'longrope' of GGUF files is not supported"),
        ({"rope_scaling_type": gguf.RopeScalingType.LINEAR}, "lacks the metadata 'llama.rope.scaling.factor'"),
    ],
)
def test_refusals(extra: dict[str, Any], message: str, tiny: Any, tmp_path: Path) -> None:
    path = write(tiny().model, tmp_path / "model.gguf", "llama", **extra)
    with pytest.raises(CheckpointError, match=message):
        LlamaFamily().config(open_checkpoint(path))


def test_a_real_file(smollm2_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    """SmolLM2-135M-Instruct, Q4_1, dequantised by transformers and by us: the same float32 logits."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    prompt = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28]
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    del theirs
    limits = BuildConfig(dtype="float32", max_seq_len=64, max_input_len=32)
    build_engine(smollm2_gguf, tmp_path / "engine", limits, plugins=plugins)
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    (ours,) = prefill_and_decode(session, [prompt], 4)
    difference = (ours - expected).abs().max().item()
    assert difference < 1e-3
