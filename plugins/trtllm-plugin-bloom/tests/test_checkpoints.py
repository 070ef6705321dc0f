"""Directories as they are published, GGUF files of the same weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import CheckpointError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_bloom.family import BloomFamily


def logits(path: Path, folder: Path, model: Any, plugins: Plugins) -> list[torch.Tensor]:
    build_engine(path, folder / "engine", model.limits, plugins=plugins)
    return prefill_and_decode(Session.from_directory(folder / "engine", plugins=plugins), model.prompts, STEPS)


def edited(model: Any, path: Path, drop: tuple[str, ...] = (), **fields: Any) -> Path:
    shutil.copytree(model.path, path)
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | fields
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_as_published(tiny: Any, tmp_path: Path, plugins: Plugins) -> None:
    """Without a prefix, and with the field names of 2022."""
    model = tiny()
    path = edited(model, tmp_path / "hf", ("hidden_size", "n_head", "num_attention_heads", "dtype"), n_embed=64,
                  num_attention_heads=4, torch_dtype="float32")  # fmt: skip
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert not bare.keys() & tensors.keys()
    save_file(bare, path / "model.safetensors")
    assert model.off(logits(path, tmp_path, model, plugins)) < 1e-4


def test_rows_beyond_the_tokenizer(tiny: Any) -> None:
    """The embedding's rows are the vocabulary, whatever the tokenizer has."""
    assert tiny(vocab_size=80).session().config.model.vocab_size == 80


def test_positions(tiny: Any, tmp_path: Path) -> None:
    family = BloomFamily()
    assert family.config(open_checkpoint(tiny().path)).max_position_embeddings == 96
    path = edited(tiny(), tmp_path / "hf", ("seq_length",))
    assert family.config(open_checkpoint(path)).max_position_embeddings == 2048


def test_a_tied_checkpoint_with_a_head_of_its_own(tiny: Any, tmp_path: Path, plugins: Plugins) -> None:
    model = tiny(tie_word_embeddings=False)
    path = edited(model, tmp_path / "hf", tie_word_embeddings=True)
    assert model.off(logits(path, tmp_path, model, plugins)) < 1e-4


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    path = edited(tiny(), tmp_path / "hf", ("n_layer", "num_hidden_layers"))
    with pytest.raises(CheckpointError, match="config.json lacks 'n_layer', which family 'bloom' needs"):
        BloomFamily().config(open_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"lacks the metadata 'bloom.attention.head_count'"):
        BloomFamily().config(open_checkpoint(write(tiny().model, tmp_path / "model.gguf", heads=False)))


def write(model: Any, path: Path, heads: bool = True) -> Path:
    """Write transformers' model as llama.cpp's converter does, in float32, by the gguf package's names."""
    c = model.config
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_context_length(c.seq_length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(4 * c.hidden_size)
    writer.add_block_count(c.n_layer)
    if heads:
        writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BLOOM, c.n_layer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        new = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if "query_key_value" in name:
            fused = tensor.unflatten(0, (c.n_head, 3, -1))
            tensor = torch.cat([fused[:, i].flatten(0, 1) for i in range(3)])
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "n_head": 3, "hidden_size": 96}])
def test_gguf(changes: dict[str, Any], tiny: Any, tmp_path: Path, plugins: Plugins) -> None:
    model = tiny(**changes)
    assert model.off(logits(write(model.model, tmp_path / "model.gguf"), tmp_path, model, plugins)) < 1e-4
