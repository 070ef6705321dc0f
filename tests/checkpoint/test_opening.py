"""Which kind of checkpoint a path is, and one sentence for each that is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.errors import CheckpointError

WriteGGUF = Callable[..., Path]


def test_a_file_or_a_directory_with_one(write_gguf: WriteGGUF) -> None:
    path = write_gguf()
    for given in (path, str(path), path.parent):
        checkpoint = open_checkpoint(given)
        assert checkpoint.format == "gguf"
        assert checkpoint.path == path


def test_safetensors_win_over_a_gguf(write_gguf: WriteGGUF) -> None:
    directory = write_gguf().parent
    (directory / "config.json").write_text('{"architectures": ["X"]}')
    assert open_checkpoint(directory).format == "gguf"
    save_file({"w": torch.ones(1)}, directory / "model.safetensors")
    assert open_checkpoint(directory).format == "hf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "not a checkpoint: it holds neither config.json"),
        (["config.json"], r"not a checkpoint: it holds no \*.safetensors"),
        (["config.json", "pytorch_model.bin"], "weights in pytorch_model.bin, which is not safetensors: convert"),
        (["model.safetensors"], "safetensors but no config.json"),
        (["a.gguf", "b.gguf"], "holds 2 GGUF files: name one"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "GGUF in 2 parts: join"),
    ],
)
def test_not_a_checkpoint(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing at"):
        open_checkpoint(tmp_path / "nowhere")


def test_one_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="give the directory"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, trtllm_core.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
