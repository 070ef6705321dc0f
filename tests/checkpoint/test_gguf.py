"""GGUF files: every tensor type, against the library and against NumPy dequantisers written from the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.errors import CheckpointError

ROWS, COLUMNS = 6, 512
WriteGGUF = Callable[..., Path]


def halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of each block, as [blocks, 1] float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """All low halves of the bytes, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and eight 6-bit minima in the 12 bytes of a Q4_K or Q5_K block."""
    scales, minima = np.zeros((2, len(packed), 8), dtype=np.float32)
    for j in range(8):
        if j < 4:
            scales[:, j] = packed[:, j] & 63
            minima[:, j] = packed[:, j + 4] & 63
        else:
            scales[:, j] = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
            minima[:, j] = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
    return scales, minima


def q4_0(b: np.ndarray) -> np.ndarray:
    return halves(b, 0) * (nibbles(b[:, 2:]) - 8)


def q4_1(b: np.ndarray) -> np.ndarray:
    return halves(b, 0) * nibbles(b[:, 4:]) + halves(b, 2)


def q8_0(b: np.ndarray) -> np.ndarray:
    return halves(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def q45_k(b: np.ndarray, high_bits: bool) -> np.ndarray:
    scales, minima = k_scales(b[:, 4:16])
    low = b[:, 48:] if high_bits else b[:, 16:]
    out = np.zeros((len(b), 8, 32), dtype=np.float32)
    for j in range(8):
        values = (low[:, 32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2))) & 15
        if high_bits:
            values = values | (((b[:, 16:48] >> j) & 1) << 4)
        out[:, j] = halves(b, 0) * scales[:, j : j + 1] * values - halves(b, 2) * minima[:, j : j + 1]
    return out


def q6_k(b: np.ndarray) -> np.ndarray:
    low, high, scales = b[:, :128], b[:, 128:192], b[:, 192:208].view(np.int8)
    out = np.zeros((len(b), 256), dtype=np.float32)
    for i in range(256):
        half, place = divmod(i, 128)
        part, lane = divmod(place, 32)
        nibble = (low[:, 64 * half + 32 * (part % 2) + lane] >> (4 * (part // 2))) & 15
        bits = (high[:, 32 * half + lane] >> (2 * part)) & 3
        value = (nibble | (bits << 4)).astype(np.int32) - 32
        out[:, i] = halves(b, 208)[:, 0] * scales[:, i // 16] * value
    return out


ORACLES: dict[Type, Callable[[np.ndarray], np.ndarray]] = {
    Type.Q4_0: q4_0,
    Type.Q4_1: q4_1,
    Type.Q8_0: q8_0,
    Type.Q4_K: lambda b: q45_k(b, high_bits=False),
    Type.Q5_K: lambda b: q45_k(b, high_bits=True),
    Type.Q6_K: q6_k,
}
HALVES = {Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q8_0: (0,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}


def random_blocks(kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bits whose float16 fields are finite."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // size, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", ORACLES, ids=lambda kind: kind.name)
def test_dequantises_like_the_format_says(kind: Type, write_gguf: WriteGGUF) -> None:
    blocks = random_blocks(kind, np.random.default_rng(7))
    path = write_gguf({"w": (blocks.reshape(ROWS, -1), kind)})
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensor("w")
    assert checkpoint.stored("w") == kind.name
    assert checkpoint.shape("w") == tuple(tensor.shape) == (ROWS, COLUMNS)
    assert checkpoint.nbytes == blocks.nbytes
    assert tensor.dtype == torch.float32
    expected = ORACLES[kind](blocks).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1], ids=lambda kind: kind.name)
def test_quantised_by_the_library(kind: Type, write_gguf: WriteGGUF) -> None:
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    packed = gguf.quants.quantize(values, kind)
    tensor = open_checkpoint(write_gguf({"w": (packed, kind)})).tensor("w")
    np.testing.assert_array_equal(tensor.numpy(), gguf.quants.dequantize(packed, kind))
    assert np.abs(tensor.numpy() - values).max() < 0.6  # at most one step of 4 bits


def test_three_dimensions(write_gguf: WriteGGUF) -> None:
    values = np.random.default_rng(1).normal(size=(3, 4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, Type.Q8_0)
    checkpoint = open_checkpoint(write_gguf({"w": (packed, Type.Q8_0)}))
    assert checkpoint.shape("w") == (3, 4, 64)
    np.testing.assert_array_equal(checkpoint.tensor("w").numpy(), gguf.quants.dequantize(packed, Type.Q8_0))


@pytest.mark.parametrize(("kind", "dtype"), [(Type.F32, torch.float32), (Type.F16, torch.float16)])
def test_plain_types_are_views_of_the_file(kind: Type, dtype: torch.dtype, write_gguf: WriteGGUF) -> None:
    values = torch.randn(5, 7).to(dtype)
    path = write_gguf({"v": (np.ones(3, np.float32), Type.F32), "w": (values.numpy(), kind)})
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensor("w")
    assert tensor.dtype == dtype
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() == checkpoint.tensor("w").data_ptr()
    tensor.zero_()  # must not reach the file
    assert path.read_bytes() == before


def test_bfloat16(write_gguf: WriteGGUF) -> None:
    values = torch.randn(4, 32).to(torch.bfloat16)
    path = write_gguf({"w": (values.view(torch.int16).numpy().view(np.uint8), Type.BF16)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.stored("w") == "BF16"
    assert torch.equal(checkpoint.tensor("w"), values)
    assert checkpoint.tensor("w").data_ptr() == checkpoint.tensor("w").data_ptr()


def test_tensors_outlive_the_checkpoint(write_gguf: WriteGGUF) -> None:
    path = write_gguf({"w": (np.arange(6, dtype=np.float32), Type.F32)})
    tensor = open_checkpoint(path).tensor("w")
    path.unlink()
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5]


def test_type_that_the_library_cannot_dequantise(write_gguf: WriteGGUF) -> None:
    size = gguf.GGML_QUANT_SIZES[Type.Q8_K][1]
    path = write_gguf({"w": (np.zeros((2, size), np.uint8), Type.Q8_K)})
    with pytest.raises(CheckpointError, match="'w' is stored as Q8_K"):
        open_checkpoint(path).tensor("w")


def test_unknown_tensor_names_near_ones(write_gguf: WriteGGUF) -> None:
    checkpoint = open_checkpoint(write_gguf({"blk.0.attn_q.weight": (np.ones(4, np.float32), Type.F32)}))
    for read in (checkpoint.tensor, checkpoint.shape, checkpoint.stored):
        with pytest.raises(CheckpointError, match="no tensor 'blk.0.attn_q'.*near names: 'blk.0.attn_q.weight'"):
            read("blk.0.attn_q")


def test_part_of_a_split_file(write_gguf: WriteGGUF) -> None:
    path = write_gguf(metadata={"split.no": 1, "split.count": 3})
    with pytest.raises(CheckpointError, match=r"part 2 of 3 .*llama-gguf-split"):
        open_checkpoint(path)


def test_real_model_reads_like_the_library(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    reader = gguf.GGUFReader(smollm2_gguf)
    assert checkpoint.architecture == "llama"
    assert checkpoint.names() == {tensor.name for tensor in reader.tensors}
    assert checkpoint.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    for tensor in reader.tensors:
        assert checkpoint.shape(tensor.name) == tuple(reversed(tensor.shape.tolist()))
        assert checkpoint.stored(tensor.name) == tensor.tensor_type.name
    for tensor in reader.tensors[:12]:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(checkpoint.tensor(tensor.name).numpy(), expected)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(checkpoint.config) == set(fields)
    for key, field in fields.items():
        assert checkpoint.config[key] == field.contents(), key
