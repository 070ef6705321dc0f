"""Telling two checkpoints apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja")
_SAMPLES, _SAMPLE_BYTES = 1024, 4096


def fingerprint(path: Path) -> str:
    """A digest of the names, sizes and evenly spread samples of a checkpoint's files; small files count as a whole.

    Two finetunes of a model differ in most of their weights, so that 4 MiB of samples a file tell them apart, where
    reading all of a large model would take minutes.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    for item in files:
        size = item.stat().st_size
        digest.update(f"{item.name}\0{size}\0".encode())
        with item.open("rb") as file:
            for offset in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
