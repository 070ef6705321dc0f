"""The compiled kernels, called with tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from trtllm_core.backends.torch.cpu.compiling import library

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Rows(ctypes.Structure):
    """The rows of a step: see ``kernels.cpp``."""

    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class Heads(ctypes.Structure):
    """The heads of an attention layer: see ``Layer`` in ``kernels.cpp``."""

    _fields_ = (
        ("rotary", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Quantized(ctypes.Structure):
    """A quantised weight: see ``kernels.cpp``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bases", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("middle", ctypes.c_int64),
    )


class Kernels:
    """Tensors are contiguous, on the CPU, and of the one dtype that this was made for.

    Raises:
        EngineUnsupportedError: see ``library``.
        KeyError: there are no kernels for ``dtype``.
    """

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        name, lib = DTYPES[dtype], library(folder)
        pointer, number = ctypes.c_void_p, ctypes.c_int64

        def function(kernel: str, *arguments: type) -> ctypes._NamedFuncPointer:
            found = lib[f"{kernel}_{name}"]  # of this object alone, unlike an attribute of the library
            found.argtypes, found.restype = arguments, None
            return found

        self._rms_norm = function("rms_norm", pointer, pointer, pointer, number, number, ctypes.c_float)
        self._silu_gate = function("silu_gate", pointer, pointer, number, number)
        self._attend = function("attend", pointer, pointer, pointer, pointer, pointer)
        self._quantized_linear = function("quantized_linear", pointer, pointer, pointer, pointer, number)
        self._dequantize = function("dequantize", pointer, pointer)
        self.dtype = dtype

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / sqrt(mean(x²) + eps) * weight``; ``x [..., size]``."""
        x = x.contiguous()
        out, size = torch.empty_like(x), x.shape[-1]
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        return out

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``; ``gate_up [..., 2 * size] -> [..., size]``."""
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        self._silu_gate(gate_up.data_ptr(), out.data_ptr(), gate_up.numel() // (2 * size), size)
        return out

    def attend(self, rows: Rows, heads: Heads, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """One query a row over its own cache, after its key and value are written there.

        ``qkv [rows, heads + 2 * kv_heads, head_size]``, not rotated; ``cache [entries, 2 * kv_heads, head_size]``.
        Returns ``[rows, heads * head_size]``.
        """
        qkv = qkv.contiguous()
        out = qkv.new_empty(qkv.shape[0], heads.heads * heads.head_size)
        self._attend(ctypes.addressof(rows), ctypes.addressof(heads), qkv.data_ptr(), cache.data_ptr(), out.data_ptr())
        return out

    def quantized_linear(self, weight: Quantized, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``, row by row over the codes: for few rows."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], weight.out)
        b = 0 if bias is None else bias.data_ptr()
        rows = x.numel() // weight.inputs
        self._quantized_linear(ctypes.addressof(weight), x.data_ptr(), b, out.data_ptr(), rows)
        return out

    def dequantize(self, weight: Quantized) -> torch.Tensor:
        """``[out, in]`` in the kernels' dtype."""
        out = torch.empty(weight.out, weight.inputs, dtype=self.dtype)
        self._dequantize(ctypes.addressof(weight), out.data_ptr())
        return out
