"""The header of a GGUF file: its metadata, and where each tensor lies.

The ``gguf`` package's reader makes an array object for every token of the vocabulary, which takes seconds for a small
model, and does not tell a truncated file from a damaged one. This one skips over arrays and decodes them when they are
asked for. What types and block sizes mean comes from the package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from trtllm_core.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 8
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: _U32,
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: _U64,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        shape: in torch's order, rows first (the file has it reversed).
        type: how it is stored.
        offset: of its first byte, from the start of the file.
        nbytes: how many bytes it takes there.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """Metadata by key. Scalars and strings are plain values; arrays become lists, decoded at the first look-up."""

    def __init__(self, cursor: _Cursor, count: int) -> None:
        self._cursor = cursor
        self._values: dict[str, Any] = {}
        self._arrays: dict[str, int] = {}
        for _ in range(count):
            key, kind = cursor.string(), cursor.kind()
            if key in self._values or key in self._arrays:
                raise cursor.damaged(f"the key {key!r} occurs twice")
            if kind is GGUFValueType.ARRAY:
                self._arrays[key] = cursor.at
                cursor.skip_array()
            else:
                self._values[key] = cursor.value(kind)
        self._order = (*self._values, *self._arrays)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values and key in self._arrays:
            self._values[key] = self._cursor.copy(self._arrays[key]).array()
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def read_header(data: memoryview, path: Path) -> tuple[Metadata, dict[str, TensorEntry]]:
    """Read a GGUF file's header.

    Args:
        data: the whole file, as bytes.
        path: its path, for messages.

    Returns:
        The metadata, and the tensors by name.

    Raises:
        CheckpointError: it is no GGUF file, one of another version or byte order, has a tensor of an unknown type, or
            is damaged or truncated, in the header or behind it.
    """
    if bytes(data[:4]) != MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint: it is no GGUF file (it does not begin with 'GGUF').")
    cursor = _Cursor(data, path, at=4)
    version = cursor.unpack(_U32)
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{path} is a big-endian GGUF: convert it with the gguf package's gguf-convert-endian."
            )
        raise CheckpointError(f"{path} is GGUF version {version}, and only 2 and 3 are known: convert the model again.")
    tensors, keys = cursor.unpack(_U64), cursor.unpack(_U64)
    metadata = Metadata(cursor, keys)
    return metadata, _tensors(cursor, tensors, _alignment(cursor, metadata))


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for _ in range(count):
        name, entry = _tensor(cursor)
        if name in entries:
            raise cursor.damaged(f"the tensor {name!r} occurs twice")
        if entry.offset % alignment:
            raise cursor.damaged(f"the tensor {name!r} does not lie at a multiple of {alignment} bytes")
        entries[name] = entry
    start = math.ceil(cursor.at / alignment) * alignment
    placed = {
        name: TensorEntry(entry.shape, entry.type, start + entry.offset, entry.nbytes)
        for name, entry in entries.items()
    }
    end = max((entry.offset + entry.nbytes for entry in placed.values()), default=0)
    if end > len(cursor.data):
        raise CheckpointError(
            f"{cursor.path} is truncated: its tensors end at byte {end}, the file at {len(cursor.data)}; download it "
            "again."
        )
    return placed


def _tensor(cursor: _Cursor) -> tuple[str, TensorEntry]:
    name, dims = cursor.string(), cursor.unpack(_U32)
    if dims > _MAX_DIMS:
        raise cursor.damaged(f"the tensor {name!r} claims {dims} dimensions")
    shape = tuple(reversed([cursor.unpack(_U64) for _ in range(dims)]))
    raw, offset = cursor.unpack(_U32), cursor.unpack(_U64)
    try:
        kind = GGMLQuantizationType(raw)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} is of the unknown GGUF type {raw}; a newer gguf package may know it "
            "(pip install --upgrade gguf)."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if (shape[-1] if shape else 1) % block:
        raise cursor.damaged(f"rows of the tensor {name!r} are no multiple of {kind.name}'s {block} values")
    return name, TensorEntry(shape, kind, offset, math.prod(shape) // block * block_bytes)


class _Cursor:
    """A place in the file that moves on as values are read."""

    def __init__(self, data: memoryview, path: Path, at: int) -> None:
        self.data = data
        self.path = path
        self.at = at

    def copy(self, at: int) -> _Cursor:
        return _Cursor(self.data, self.path, at)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; download it again.")

    def skip(self, count: int) -> int:
        """Move on by a number of bytes; returns where they begin."""
        begin, end = self.at, self.at + count
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: its header goes on behind byte {len(self.data)}, where the file ends; "
                "download it again."
            )
        self.at = end
        return begin

    def unpack(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self.data, self.skip(layout.size))[0]

    def string(self) -> str:
        begin = self.skip(self.unpack(_U64))
        return str(self.data[begin : self.at], encoding="utf-8", errors="replace")

    def kind(self) -> GGUFValueType:
        raw = self.unpack(_U32)
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise self.damaged(f"a metadata value has the unknown type {raw}") from None

    def value(self, kind: GGUFValueType) -> Any:
        return self.string() if kind is GGUFValueType.STRING else self.unpack(_SCALARS[kind])

    def array_type(self) -> tuple[GGUFValueType, int]:
        kind, count = self.kind(), self.unpack(_U64)
        if kind is GGUFValueType.ARRAY:
            raise self.damaged("a metadata array holds arrays, which GGUF does not use")
        return kind, count

    def skip_array(self) -> None:
        kind, count = self.array_type()
        if kind is GGUFValueType.STRING:
            for _ in range(count):
                self.skip(self.unpack(_U64))
        else:
            self.skip(count * _SCALARS[kind].size)

    def array(self) -> list[Any]:
        kind, count = self.array_type()
        if kind is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        size = count * _SCALARS[kind].size
        begin = self.skip(size)
        return [value for (value,) in _SCALARS[kind].iter_unpack(self.data[begin : begin + size])]
