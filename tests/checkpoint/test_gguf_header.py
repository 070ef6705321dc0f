"""The header parser: what is written is read, and damage is always a CheckpointError."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.checkpoint.gguf_header import read_header
from trtllm_core.errors import CheckpointError

WriteGGUF = Callable[..., Path]
METADATA = {
    "flag": True,
    "number": 7,
    "real": 0.5,
    "text": "größer ▁",
    "numbers": [1, -2, 3],
    "reals": [0.25, -1.5],
    "texts": ["a", "", "日本"],
}


@pytest.fixture
def sample(write_gguf: WriteGGUF) -> bytes:
    tensors = {
        "a": (np.arange(12, dtype=np.float32).reshape(3, 4), Type.F32),
        "b": (np.zeros((2, 34), np.uint8), Type.Q8_0),
    }
    return write_gguf(tensors, METADATA).read_bytes()


def read(data: bytes) -> object:
    return read_header(memoryview(data), Path("x.gguf"))


def test_reads_what_was_written(sample: bytes) -> None:
    metadata, entries = read_header(memoryview(sample), Path("x.gguf"))
    assert dict(metadata) == {"general.architecture": "llama", **METADATA}
    assert metadata["texts"] is metadata["texts"]
    assert "texts" in metadata
    assert "nothing" not in metadata
    assert metadata.get("nothing", 3) == 3
    assert entries["a"].shape == (3, 4)
    assert entries["b"].shape == (2, 32)
    start = entries["a"].offset
    assert np.frombuffer(sample[start : start + 48], np.float32).tolist() == list(range(12))


scalars = st.one_of(
    st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), st.text(min_size=1, max_size=20)
)
arrays = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9), st.lists(st.text(), min_size=1, max_size=9)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.text("abc._", min_size=1), scalars | arrays, max_size=6))
def test_any_metadata(metadata: dict[str, object], write_gguf: WriteGGUF) -> None:
    found, _ = read_header(memoryview(write_gguf(metadata=metadata).read_bytes()), Path("x.gguf"))
    assert dict(found) == {"general.architecture": "llama", **metadata}
    assert len(found) == len(metadata) + 1


def test_truncated_anywhere(sample: bytes) -> None:
    end = len(sample.rstrip(b"\0"))  # behind the last tensor there may be padding, which may be missing
    end = max(end, max(entry.offset + entry.nbytes for entry in read_header(memoryview(sample), Path("x"))[1].values()))
    for length in range(4, end):
        with pytest.raises(CheckpointError, match="truncated"):
            read(sample[:length])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_anywhere(sample: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    try:
        metadata, _ = read_header(memoryview(bytes(damaged)), Path("x.gguf"))
        dict(metadata)
    except CheckpointError:
        pass


def test_unknown_tensor_type(sample: bytes) -> None:
    entry = struct.pack("<QQI", 32, 2, Type.Q8_0.value)
    assert sample.count(entry) == 1
    broken = sample.replace(entry, struct.pack("<QQI", 32, 2, 99))
    with pytest.raises(CheckpointError, match="tensor 'b' is of the unknown GGUF type 99"):
        read(broken)


def test_rows_that_are_no_multiple_of_the_block(sample: bytes) -> None:
    entry = struct.pack("<QQI", 32, 2, Type.Q8_0.value)
    with pytest.raises(CheckpointError, match="no multiple of Q8_0's 32"):
        read(sample.replace(entry, struct.pack("<QQI", 31, 2, Type.Q8_0.value)))


@pytest.mark.parametrize(
    ("version", "message"), [(struct.pack(">I", 3), "big-endian"), (struct.pack("<I", 1), "GGUF version 1")]
)
def test_other_versions(version: bytes, message: str, sample: bytes) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(sample[:4] + version + sample[8:])


def test_other_alignment(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, np.full(3, ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor("b").tolist() == [98.0] * 3
    assert checkpoint.config["general.alignment"] == 256


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something else")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it is no GGUF file"):
        open_checkpoint(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "empty.gguf")
