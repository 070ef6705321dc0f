"""Small checkpoints, written on the fly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

WriteGGUF = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a GGUF file: ``write_gguf(tensors={name: (array, type)}, metadata={key: value})``."""

    def write(
        tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (metadata or {}).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for tensor, (array, kind) in (tensors or {}).items():
            writer.add_tensor(tensor, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
