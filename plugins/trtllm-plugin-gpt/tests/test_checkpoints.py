"""What the family reads from Hugging Face directories, in the spellings of old and new ones, and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import ModelConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import CheckpointError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_gpt.family import GPTFamily

Edit = Callable[..., Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """``edited(model, drop, tensors, **set)``: a copy of a model's directory with another config and other tensors."""

    def edit(model: Any, drop: tuple[str, ...] = (), tensors: Any = None, **fields: Any) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(model.path, path, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in drop} | fields
        (path / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            save_file(tensors(load_file(path / "model.safetensors")), path / "model.safetensors")
        return path

    return edit


def read(path: Path) -> ModelConfig:
    return GPTFamily().config(open_checkpoint(path))


def logits(path: Path, model: Any, plugins: Plugins) -> list[torch.Tensor]:
    build_engine(path, path.with_name("engine"), model.limits, plugins=plugins)
    session = Session.from_directory(path.with_name("engine"), plugins=plugins)
    return prefill_and_decode(session, model.prompts, STEPS)


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gpt2", "transformer."), ("gptj", "transformer."), ("neox", "gpt_neox.")]
)
def test_names_without_a_prefix_and_old_buffers(
    kind: str, prefix: str, tiny: Any, edited: Edit, plugins: Plugins
) -> None:
    """The model below the head, with the causal masks and rotary tables that old checkpoints carry along."""
    model = tiny(kind)
    buffers = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq") if kind == "neox" else (
        "attn.bias", "attn.masked_bias", "attn.embed_positions")  # fmt: skip
    layer = "layers.0." if kind == "neox" else "h.0."

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        assert len(bare.keys() & tensors.keys()) < 3  # all names but those of the head had the prefix
        return bare | {layer + name: torch.ones(2) for name in buffers}

    assert model.off(logits(edited(model, tensors=change), model, plugins)) < 1e-4


def test_the_old_name_of_neox_heads(tiny: Any, edited: Edit, plugins: Plugins) -> None:
    model = tiny("neox")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
        renamed = {old.get(name, name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        return renamed

    assert model.off(logits(edited(model, tensors=change), model, plugins)) < 1e-4


def test_old_spellings(tiny: Any, edited: Edit) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = tiny("neox", rope_parameters=rope)
    path = edited(model, ("rope_parameters", "dtype"), rotary_pct=0.5, rotary_emb_base=500, torch_dtype="float32")
    assert read(path) == read(model.path)
    assert read(model.path).extras["rotary_dim"] == 8
    assert read(edited(tiny("neox"), ("rope_parameters",))).extras["rotary_dim"] == 4  # a quarter is the default


def test_defaults_of_old_configs(tiny: Any, edited: Edit) -> None:
    fields = ("n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings",
              "scale_attn_by_inverse_layer_idx", "n_positions", "add_cross_attention", "dtype")  # fmt: skip
    config = read(edited(tiny("gpt2"), fields))
    assert config.replace(max_position_embeddings=96) == read(tiny("gpt2").path)
    assert config.max_position_embeddings == 1024
    assert config.extras["tied_head"]


def test_a_tied_checkpoint_with_a_head_of_its_own(tiny: Any, edited: Edit, plugins: Plugins) -> None:
    model = tiny("gpt2", tie_word_embeddings=False)
    assert model.off(logits(edited(model, tie_word_embeddings=True), model, plugins)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "drop", "fields", "message"),
    [
        ("gpt2", ("n_head",), {}, "config.json lacks 'n_head', which family 'gpt' needs"),
        ("gpt2", (), {"activation_function": "swoosh"}, "activation_function 'swoosh' is not one of gelu, "),
        ("gpt2", (), {"add_cross_attention": True}, "cross attention, which family 'gpt' does not have"),
        ("gptj", (), {"tie_word_embeddings": True}, "ties GPT-J's head to its embedding, which has no bias"),
        ("neox", (), {"rope_parameters": {"rope_type": "wide"}}, "rope scaling 'wide' is not supported"),
    ],
)
def test_refusals(kind: str, drop: tuple[str, ...], fields: Any, message: str, tiny: Any, edited: Edit) -> None:
    def headless(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}

    with pytest.raises(CheckpointError, match=message):
        read(edited(tiny(kind), drop, headless if "tie_word_embeddings" in fields else None, **fields))
