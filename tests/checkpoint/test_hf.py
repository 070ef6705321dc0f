"""Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.errors import CheckpointError

TENSORS = {
    "model.embed.weight": torch.randn(8, 4).to(torch.bfloat16),
    "model.norm.weight": torch.ones(4),
    "model.up.weight": torch.randn(6, 4).to(torch.float16),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4}))
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    assert checkpoint.format == "hf"
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.names() == set(TENSORS)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert [checkpoint.stored(name) for name in TENSORS] == ["BF16", "F32", "F16"]
    assert checkpoint.tokenizer() is None


def test_tensors_are_views_and_the_file_stays(single: Path) -> None:
    before = (single / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(single)
    tensor = checkpoint.tensor("model.norm.weight")
    assert tensor.data_ptr() == checkpoint.tensor("model.norm.weight").data_ptr()
    tensor.zero_()
    assert (single / "model.safetensors").read_bytes() == before


def test_unknown_tensor(single: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'model.norm'.*near names: 'model.norm.weight'"):
        open_checkpoint(single).tensor("model.norm")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-1.safetensors', which the directory lacks"):
        open_checkpoint(sharded)


def test_shard_without_its_tensor(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / "model-1.safetensors")
    with pytest.raises(CheckpointError, match="lists 1 tensors that its shards lack, the first being 'model.norm"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_truncated(single: Path, length: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(single)


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="3 safetensors files but no model.safetensors.index.json"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_bad_config(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(single)


def test_no_architecture(single: Path) -> None:
    (single / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no 'architectures'"):
        _ = open_checkpoint(single).architecture
