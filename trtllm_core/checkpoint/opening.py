"""Telling which kind of checkpoint a path is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trtllm_core.checkpoint.base import Checkpoint
from trtllm_core.errors import CheckpointError

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint for reading.

    Args:
        path: a directory with ``config.json`` and safetensors, a GGUF file, or a directory that holds exactly one GGUF
            file. Where a directory holds both kinds, the safetensors win.

    Raises:
        CheckpointError: there is nothing at the path, it is no checkpoint, or a file of it is missing or damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path}: give a Hugging Face directory or a GGUF file.")
    return _open_directory(path) if path.is_dir() else _open_file(path)


def _open_directory(path: Path) -> Checkpoint:
    from trtllm_core.checkpoint.hf import HFCheckpoint, has_safetensors

    has_config = (path / "config.json").exists()
    if has_config and has_safetensors(path):
        return HFCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_file(ggufs[0])
    if ggufs and all(_SPLIT.search(file.name) for file in ggufs):
        raise CheckpointError(
            f"{path} holds a GGUF in {len(ggufs)} parts: join them first, with llama.cpp's "
            f"`llama-gguf-split --merge {ggufs[0].name} joined.gguf`."
        )
    if ggufs:
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files: name one of them, such as {ggufs[0]}.")
    if has_safetensors(path):
        raise CheckpointError(
            f"{path} holds safetensors but no config.json: download the checkpoint's config.json too."
        )
    pickles = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise CheckpointError(
            f"{path} has its weights in {pickles[0].name}, which is not safetensors: convert it, for instance with "
            "transformers' `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    lacks = "no *.safetensors" if has_config else "neither config.json with *.safetensors, nor a .gguf file"
    raise CheckpointError(f"{path} is not a checkpoint: it holds {lacks}.")


def _open_file(path: Path) -> Checkpoint:
    from trtllm_core.checkpoint.gguf import GGUFCheckpoint

    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a checkpoint: give the directory, which holds config.json too.")
    return GGUFCheckpoint(path)
