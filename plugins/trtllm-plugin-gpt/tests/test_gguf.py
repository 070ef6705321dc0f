"""GGUF files of the same weights give the logits of the Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import CheckpointError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_gpt.family import GPTFamily

ARCHITECTURES = {"gpt2": gguf.MODEL_ARCH.GPT2, "gptneox": gguf.MODEL_ARCH.GPTNEOX}


def write(model: Any, path: Path, kind: str, drop: str = "") -> Path:
    """Write transformers' model as llama.cpp's converter does, in float32, by the gguf package's names."""
    c = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(c.n_inner or 4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(c.intermediate_size)
        if drop != "layer_norm_epsilon":
            writer.add_layer_norm_eps(c.layer_norm_eps)
        writer.add_parallel_residual(c.use_parallel_residual)
        size = c.hidden_size // c.num_attention_heads
        writer.add_rope_dimension_count(int(size * c.rope_parameters["partial_rotary_factor"]))
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T
        elif "query_key_value" in name:
            heads = tensor.unflatten(0, (c.num_attention_heads, 3, -1))
            tensor = torch.cat([heads[:, i].flatten(0, 1) for i in range(3)])
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "gpt2", {}),
    "gpt2 untied": ("gpt2", "gpt2", {"tie_word_embeddings": False, "n_inner": 88}),
    "gptneox": ("gptneox", "neox", {}),
    "gptneox serial": ("gptneox", "neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gptneox whole": (
        "gptneox",
        "neox",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 10000.0}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights(case: str, tiny: Any, tmp_path: Path, plugins: Plugins) -> None:
    arch, kind, changes = CASES[case]
    model = tiny(kind, **changes)
    build_engine(write(model.model, tmp_path / "model.gguf", arch), tmp_path / "engine", model.limits, plugins=plugins)
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    assert model.off(prefill_and_decode(session, model.prompts, STEPS)) < 1e-4
    ours, theirs = session.config.model.extras, model.session().config.model.extras
    assert ours.pop("norm_eps") == pytest.approx(theirs.pop("norm_eps"))  # GGUF has it in float32
    assert ours == theirs


def test_a_lacking_entry(tiny: Any, tmp_path: Path) -> None:
    path = write(tiny("neox").model, tmp_path / "model.gguf", "gptneox", drop="layer_norm_epsilon")
    with pytest.raises(CheckpointError, match=r"lacks the metadata 'gptneox.attention.layer_norm_epsilon'"):
        GPTFamily().config(open_checkpoint(path))
