"""What the family reads from Hugging Face configs, in the spellings of old and new transformers, and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import ModelConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import CheckpointError, ConfigError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_llama.family import LlamaFamily

Edit = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
}


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """``edited(model, drop, **set)``: a copy of a model's directory with another config.json."""

    def edit(model: Any, drop: tuple[str, ...] = (), **fields: Any) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(model.path, path, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in drop} | fields
        (path / "config.json").write_text(json.dumps(config))
        return path

    return edit


def read(path: Path) -> ModelConfig:
    return LlamaFamily().config(open_checkpoint(path))


@pytest.mark.parametrize("kind", ["none", *SCALINGS])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_spellings(kind: str, key: str, tiny: Any, edited: Edit) -> None:
    """``rope_theta`` + ``rope_scaling`` + ``torch_dtype`` say the same as ``rope_parameters`` + ``dtype``."""
    scaling = SCALINGS.get(kind, {"rope_type": "default"})
    model = tiny("llama", dtype="bfloat16", rope_parameters={"rope_theta": 500.0, **scaling})
    written = json.loads((model.path / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= written.keys()  # what this transformers writes is the new spelling
    old = {key if k == "rope_type" else k: v for k, v in scaling.items()} if kind != "none" else None
    path = edited(model, ("rope_parameters", "dtype"), rope_theta=500.0, rope_scaling=old, torch_dtype="bfloat16")
    config = read(path)
    assert config == read(model.path)
    assert (config.dtype, config.extras["rope_theta"], config.extras["rope_scaling"]["kind"]) == (
        "bfloat16",
        500.0,
        kind,
    )
    theirs = transformers.AutoConfig.from_pretrained(path).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"]) == (500.0, "default" if kind == "none" else kind)


@pytest.mark.parametrize(
    ("kind", "longest"), [("none", 96), ("llama3", 96), ("linear", 288), ("dynamic", 192), ("yarn", 96)]
)
def test_scaling_stretches_the_limit(kind: str, longest: int, tiny: Any) -> None:
    scaling = SCALINGS.get(kind, {"rope_type": "default"})
    model = tiny("llama", dtype="bfloat16", rope_parameters={"rope_theta": 500.0, **scaling})
    assert read(model.path).max_position_embeddings == longest


def test_yarn_without_a_factor(tiny: Any, edited: Edit) -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 24, "rope_theta": 10000.0}
    scaling = read(edited(tiny(), rope_parameters=rope)).extras["rope_scaling"]
    assert scaling["factor"] == 96 / 24


def test_fields_of_other_architectures(tiny: Any, edited: Edit) -> None:
    """LLaMA has no window and Qwen2 none unless it says so, whatever their configs carry along."""
    assert read(edited(tiny(), sliding_window=10)).sliding_window is None
    assert read(edited(tiny("qwen2"), sliding_window=10, layer_types=None)).sliding_window is None
    assert read(edited(tiny("mistral", sliding_window=12))).sliding_window == 12
    path = edited(tiny("qwen2"), ("layer_types",), sliding_window=10, use_sliding_window=True, max_window_layers=2)
    assert read(path).sliding_window == 10
    assert read(path).extras["windowed_layers"] == [2]


def test_old_configs_lack_fields(tiny: Any, edited: Edit) -> None:
    config = read(edited(tiny(), ("num_key_value_heads", "head_dim", "dtype", "rope_parameters", "hidden_act")))
    assert (config.num_kv_heads, config.head_size, config.dtype) == (4, 16, "float32")
    assert config.extras["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("drop", "fields", "message"),
    [
        (("hidden_size", "vocab_size"), {}, "config.json lacks 'hidden_size', which family 'llama' needs"),
        ((), {"hidden_act": "swish2"}, "hidden_act 'swish2' is not one of gelu, .*silu"),
        ((), {"rope_parameters": {"rope_type": "wide", "factor": 2.0}}, "'wide' is not supported"),
        ((), {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' .* lacks its short_factor or"),
        ((), {"rope_parameters": {"rope_type": "linear"}}, "'linear' in config.json lacks its factor"),
    ],
)
def test_refusals(drop: tuple[str, ...], fields: dict[str, Any], message: str, tiny: Any, edited: Edit) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(edited(tiny(), drop, **fields))


def test_heads_that_do_not_divide(tiny: Any, edited: Edit) -> None:
    with pytest.raises(ConfigError, match=r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"):
        read(edited(tiny(), num_key_value_heads=3))


def test_a_stored_rotary_table_is_left_out(tiny: Any, edited: Edit, tmp_path: Path, plugins: Plugins) -> None:
    model = tiny()
    path = edited(model)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors")
    build_engine(path, tmp_path / "engine", plugins=plugins)
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    assert model.off(prefill_and_decode(session, model.prompts, STEPS)) < 1e-4


def test_a_tied_checkpoint_with_a_head_of_its_own(tiny: Any, edited: Edit, tmp_path: Path, plugins: Plugins) -> None:
    """transformers keeps two different tensors apart although config.json ties them, and so do we."""
    path = edited(tiny(), tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    build_engine(path, tmp_path / "engine", plugins=plugins)
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    assert tiny().off(prefill_and_decode(session, tiny().prompts, STEPS)) < 1e-4
