"""Weights on disk as safetensors: written one tensor at a time, read as views of the mapped file."""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trtllm_core.errors import CheckpointError, EngineCorruptError, listing
from trtllm_core.plugin import StoredTensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 64


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file while holding one tensor at a time.

    The safetensors library wants all tensors at once, which for a large model is all memory that there is.
    ``tensors`` come in any order, each name of ``shapes`` once, on the CPU. ``dtype`` is of all, or of each.

    Raises:
        CheckpointError: a tensor has another shape than the module's parameter, is unknown to it, or did not come.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    offset = 0
    # Codes may take any number of bytes: the widest types come first, so that every tensor lies as its items need.
    for name, shape in sorted(shapes.items(), key=lambda one: -dtypes[one[0]].itemsize):
        size = torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        left = set(shapes)
        for name, tensor in tensors:
            if name not in left:
                raise CheckpointError(
                    f"the family's weight map gives {name!r} twice, or its module has no such parameter"
                )
            left.remove(name)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise CheckpointError(
                    f"parameter {name!r} is {list(shapes[name])} by the checkpoint's config, but its tensors make "
                    f"{list(tensor.shape)}"
                )
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.to(dtypes[name]).contiguous().flatten().view(torch.uint8).numpy().data)
        if left:  # they would be zeros
            raise CheckpointError(f"the family's weight map lacks the module's parameters {listing(left)}")


class Weights:
    """All tensors of a safetensors file: on the CPU views of the mapping or buffer, elsewhere copies.

    Raises:
        EngineCorruptError: the file is missing, truncated or no safetensors file.
    """

    def __init__(self, source: Path | bytes | memoryview, device: torch.device) -> None:
        self._map: mmap.mmap | None = None
        if isinstance(source, Path) and device.type == "cpu":
            read_metadata(source)  # the library's own checks of the header and the length
            buffer = map_file(source)
            self._map = buffer.obj  # type: ignore[assignment]
        elif isinstance(source, Path):
            self.tensors = _read(source, device)
            return
        else:
            buffer = memoryview(source)
        self._start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() if self._map is not None else 0
        self.tensors = {name: tensor.to(device) for name, tensor in _parse(buffer).items()}

    def evict(self, tensor: torch.Tensor) -> None:
        """Give back the memory of a mapped tensor's pages. It stays usable: they are read again when touched.

        Nothing happens to tensors that do not lie in a mapped file.
        """
        if self._map is None:
            return
        begin = tensor.data_ptr() - self._start
        first, last = -(-begin // mmap.PAGESIZE), (begin + tensor.nbytes) // mmap.PAGESIZE
        if begin >= 0 and last > first and last * mmap.PAGESIZE <= len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _read(source: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        with safe_open(source, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _corrupt(source, error) from error


def read_metadata(source: Path | bytes | memoryview) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        EngineCorruptError: as for ``Weights``.
    """
    if not isinstance(source, Path):
        return dict(_header(memoryview(source))[0].get("__metadata__", {}))
    try:
        with safe_open(source, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _corrupt(source, error) from error


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length, in bytes, of each tensor of a safetensors file.

    Raises:
        EngineCorruptError: as for ``Weights``.
    """
    read_metadata(path)
    header, start = _header(map_file(path))
    return {
        name: (start + item["data_offsets"][0], item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in header.items()
        if name != "__metadata__"
    }


def stored_tensors(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file as its header tells of them, in the order in which they lie there.

    Raises:
        EngineCorruptError: as for ``Weights``.
    """
    read_metadata(path)
    header, _ = _header(map_file(path))
    items = [(name, item) for name, item in header.items() if name != "__metadata__"]
    items.sort(key=lambda pair: pair[1]["data_offsets"])
    return tuple(
        StoredTensor(name, item["dtype"], tuple(item["shape"]), item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in items
    )


def map_file(path: Path) -> memoryview:
    """A file's bytes, read from disk as they are touched."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def is_safetensors(source: Path | bytes | memoryview) -> bool:
    """Whether a file or buffer begins like safetensors: a length, then a JSON object."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(9)[8:] == b"{"
    return bytes(memoryview(source)[8:9]) == b"{"


def _header(buffer: memoryview) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(buffer[:8], "little")
    try:
        header = json.loads(bytes(buffer[8 : 8 + size]))
    except ValueError as error:
        raise EngineCorruptError("the serialised engine has no whole safetensors header: it was truncated") from error
    return header, 8 + size


def _parse(buffer: memoryview) -> dict[str, torch.Tensor]:
    header, start = _header(buffer)
    out = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        first, last = item["data_offsets"]
        if start + last > len(buffer):
            raise EngineCorruptError(f"the serialised engine ends inside {name!r}: it was truncated")
        with warnings.catch_warnings():  # of read-only buffers: nobody writes to weights
            warnings.simplefilter("ignore", UserWarning)
            piece = torch.frombuffer(buffer, dtype=torch.uint8, count=last - first, offset=start + first)
        out[name] = piece.view(_DTYPES[item["dtype"]]).view(item["shape"])
    return out


def _corrupt(path: Path, error: Exception) -> EngineCorruptError:
    return EngineCorruptError(f"engine file {path} cannot be read: {error}; build the engine again")
