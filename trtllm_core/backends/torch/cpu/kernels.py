"""The compiled operations, called with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trtllm_core.backends.torch.cpu.compiling import library
from trtllm_core.backends.torch.cpu.operations import (
    NUMBER,
    POINTER,
    Attend,
    Copy,
    Dequantize,
    Gate,
    Heads,
    Lookup,
    Norm,
    Operation,
    Packed,
    Product,
    Rows,
)
from trtllm_core.backends.torch.cpu.program import Program
from trtllm_core.backends.torch.layer_cache import CODES, LayerCache

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

SHARE_FROM = 1 << 15
"""Elements below which a second thread costs more than it saves."""


class Kernels:
    """Tensors are contiguous, on the CPU, and of the one dtype that this was made for.

    Each method runs at once, or is written down while ``record`` lasts.

    Raises:
        EngineUnsupportedError: see ``library``.
        KeyError: there are no kernels for ``dtype``.
    """

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        name, lib = DTYPES[dtype], library(folder)

        def address(operation: str) -> int:
            found = ctypes.cast(lib[f"{operation}_{name}"], POINTER).value
            assert found is not None
            return found

        self._rms_norm, self._silu_gate = address("rms_norm"), address("silu_gate")
        self._attend: dict[str | None, int] = {kind: address(f"attend_{kind}") for kind in CODES}
        self._attend[None] = address("attend")
        self._linear, self._lookup, self._dequantize = address("linear"), address("lookup"), address("dequantize")
        self._copy = ctypes.cast(lib["copy_rows"], POINTER).value or 0
        self._run = lib["run"]
        self._run.argtypes, self._run.restype = (POINTER, NUMBER, NUMBER), None
        self.dtype = dtype
        self.multiplies_bytes: bool = bool(lib["multiplies_bytes"]())
        """Whether products with rounded activations can be had."""
        self._program: Program | None = None

    @contextmanager
    def record(self) -> Iterator[Program]:
        """Operations are written down, and none is run: outputs hold nothing."""
        assert self._program is None, "programs are recorded one at a time"
        self._program = Program(self._run)
        try:
            yield self._program
        finally:
            self._program = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / sqrt(mean(x²) + eps) * weight``; ``x [..., size]``."""
        x = x.contiguous()
        out, size = torch.empty_like(x), x.shape[-1]
        arguments = Norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        self._fusable(self._rms_norm, arguments, x, out, (x, weight))
        return out

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``; ``gate_up [..., 2 * size] -> [..., size]``."""
        x = gate_up.contiguous()
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        self._fusable(self._silu_gate, Gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * size), size), x, out, (x,))
        return out

    def attend(self, rows: Rows, heads: Heads, qkv: torch.Tensor, cache: LayerCache, work: int = 0) -> torch.Tensor:
        """One query a row over its own cache, after its key and value are written there.

        ``qkv [rows, heads + 2 * kv_heads, head_size]``, not rotated. Returns ``[rows, heads * head_size]``. ``work``:
        about how many elements of keys it looks at.
        """
        qkv = qkv.contiguous()
        out = qkv.new_empty(qkv.shape[0], heads.heads * heads.head_size)
        scales = None if cache.scales is None else cache.scales.data_ptr()
        where = qkv.data_ptr(), cache.data.data_ptr(), scales, out.data_ptr()
        arguments = Attend(ctypes.addressof(rows), heads, *where)
        self._do(self._attend[cache.kind], arguments, work, (qkv,), (qkv, cache, out, rows))
        return out

    def linear(
        self,
        weight: Packed,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        rounds: bool = False,
    ) -> torch.Tensor:
        """``x [..., in] -> [..., out]``, plus ``residual``, tile by tile over the codes: for few rows.

        ``rounds``: to 8 bits are activations rounded, if ``multiplies_bytes``.
        """
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = x.new_empty(*x.shape[:-1], weight.out)
        arguments = Product(
            weight=weight,
            x=x.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            out=out.data_ptr(),
            rows=x.numel() // weight.inputs,
            rounds=rounds,
        )
        if self._program is not None:
            self._program.fuse(arguments)
        read = (x,) if residual is None else (x, residual)
        # What the product computes itself is not read: its address is another by now.
        self._do(
            self._linear,
            arguments,
            weight.out * weight.inputs,
            read[1 if arguments.before else 0 :],
            (*read, bias, out),
        )
        return out

    def lookup(self, weight: Packed, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a quantised table: int32 ``ids [...] -> [..., in]``."""
        out = torch.empty(*ids.shape, weight.inputs, dtype=self.dtype)
        arguments = Lookup(weight, ids.data_ptr(), out.data_ptr(), ids.numel())
        self._do(self._lookup, arguments, out.numel(), (ids,), (ids, out))
        return out

    def copy_rows(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table ``[any, size]``: int32 ``ids [...] -> [..., size]``."""
        out = table.new_empty(*ids.shape, table.shape[-1])
        size = table.shape[-1] * table.itemsize
        arguments = Copy(table.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.numel(), size)
        self._do(self._copy, arguments, out.numel(), (ids,), (ids, table, out))
        return out

    def dequantize(self, weight: Packed) -> torch.Tensor:
        """``[out, in]`` in the kernels' dtype."""
        out = torch.empty(weight.out, weight.inputs, dtype=self.dtype)
        self._do(self._dequantize, Dequantize(weight, out.data_ptr()), out.numel(), (), (out,))
        return out

    def _fusable(
        self, function: int, arguments: ctypes.Structure, x: torch.Tensor, out: torch.Tensor, tensors: Sequence[Any]
    ) -> None:
        if self._program is None:
            self._do(function, arguments, x.numel(), (), ())
        else:
            self._program.defer(function, arguments, _storages((x,)), out, tensors)

    def _do(
        self,
        function: int,
        arguments: ctypes.Structure,
        work: int,
        read: Sequence[torch.Tensor],
        tensors: Sequence[Any],
    ) -> None:
        if self._program is not None:
            self._program.append(function, arguments, _storages(read), tensors)
            return
        operation = Operation(function, ctypes.addressof(arguments))
        self._run(ctypes.addressof(operation), 1, torch.get_num_threads() if work >= SHARE_FROM else 1)


def _storages(tensors: Sequence[torch.Tensor]) -> list[int]:
    """What the tensors lie in, by address."""
    return [one.untyped_storage().data_ptr() for one in tensors]
