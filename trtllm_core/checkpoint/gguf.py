"""GGUF checkpoints: weights, config and tokenizer in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from gguf.constants import GGMLQuantizationType

from trtllm_core.checkpoint.base import Checkpoint
from trtllm_core.checkpoint.gguf_header import TensorEntry, read_header
from trtllm_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from trtllm_core.checkpoint.tokenizer import TokenizerFiles
    from trtllm_core.quantize import QuantizedWeight

_PLAIN: dict[GGMLQuantizationType, type[np.generic]] = {
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: np.int16,  # NumPy has no bfloat16: torch reinterprets the bits
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, version 2 or 3, little-endian, in one part.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no such file, is damaged or truncated, holds a tensor of an unknown type, or is one of
            several parts.
    """

    format: ClassVar[Literal["hf", "gguf"]] = "gguf"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._data = _map(path)
        self._metadata, self._entries = read_header(self._data.data, path)
        parts = self._metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            part = self._metadata.get("split.no", 0) + 1
            raise CheckpointError(
                f"{path} is part {part} of {parts} of a GGUF: join the parts first, with llama.cpp's `llama-gguf-split "
                "--merge FIRST_PART JOINED`."
            )

    @property
    def architecture(self) -> str:
        """The metadata's ``general.architecture``.

        Raises:
            CheckpointError: the metadata has none.
        """
        name = self._metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path} has no 'general.architecture' in its metadata: it holds no model.")
        return name

    @property
    def config(self) -> Mapping[str, Any]:
        return self._metadata

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored(self, name: str) -> str:
        return str(self._entry(name).type.name)

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        entry = self._entry(name)
        raw = self._data[entry.offset : entry.offset + entry.nbytes]
        if entry.type not in _PLAIN:
            return torch.from_numpy(self._dequantize(name, entry, raw))
        # A file may align its tensors to less than their items need: only then "A" makes a copy.
        array = np.require(raw.view(_PLAIN[entry.type]), requirements="A").reshape(entry.shape)
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if entry.type is GGMLQuantizationType.BF16 else tensor

    def quantized(self, name: str) -> QuantizedWeight:
        import torch

        from trtllm_core.quantize import GGUF_BITS, from_gguf

        entry = self._entry(name)
        if entry.type.name not in GGUF_BITS or len(entry.shape) != 2:
            return super().quantized(name)
        raw = self._data[entry.offset : entry.offset + entry.nbytes].reshape(entry.shape[0], -1)
        return from_gguf(torch.from_numpy(raw), entry.type.name)

    def tokenizer(self) -> TokenizerFiles | None:
        from trtllm_core.checkpoint.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(self._metadata, self.path)

    def _dequantize(self, name: str, entry: TensorEntry, raw: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        row_bytes = entry.nbytes * entry.shape[-1] // max(1, int(np.prod(entry.shape)))
        try:
            values: np.ndarray = dequantize(raw.reshape(*entry.shape[:-1], row_bytes), entry.type)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {entry.type.name}, which gguf cannot dequantise: "
                "take a GGUF of another quantisation."
            ) from None
        return values.reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._unknown(name) from None


def _map(path: Path) -> np.ndarray:
    try:
        # Copy-on-write: torch wants writable memory under its tensors, and the file must not change.
        mapped = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    return np.asarray(mapped)
