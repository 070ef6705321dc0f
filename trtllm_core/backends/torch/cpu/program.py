"""A step as a list of operations over fixed memory, which one call runs: what a CUDA graph is to a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trtllm_core.backends.torch.cpu.operations import Before, Norm, Operation, Product

ALLOCATIONS = ("aten::empty", "aten::new_empty")


class NotRecordableError(Exception):
    """A module does more than the operations that there are."""


class Program:
    """Operations in the order in which they were recorded. Nothing runs while they are.

    Every operation has an output of its own, so that no two write the same memory, and a norm or a gate whose only
    readers are products may be computed by each of them, at any later place. What is read is told by the address of its
    storage, since it may be a view: of an output, that is where the output begins.

    Args:
        run: the library's, over an array of operations.
    """

    def __init__(self, run: Callable[[Any, int, int], None]) -> None:
        self._run_all = run
        self._operations: list[Operation] = []
        self._kept: list[Any] = []
        self._deferred: dict[int, tuple[int, ctypes.Structure]] = {}
        self._array: Any = None

    def __len__(self) -> int:
        return len(self._operations)

    def append(self, function: int, arguments: ctypes.Structure, reads: Sequence[int], tensors: Sequence[Any]) -> None:
        """Record an operation.

        Args:
            function: its address.
            reads: storages that it reads as they are.
            tensors: what its addresses point into; kept as long as the program.
        """
        self._flush(reads)
        self._add(function, arguments)
        self._kept += tensors

    def defer(
        self,
        function: int,
        arguments: ctypes.Structure,
        reads: Sequence[int],
        out: torch.Tensor,
        tensors: Sequence[Any],
    ) -> None:
        """Record an operation that runs only where something else than a product of all of ``out`` reads it."""
        self._flush(reads)
        self._deferred[out.data_ptr()] = function, arguments
        self._kept += (out, *tensors)

    def fuse(self, product: Product) -> None:
        """Let a product compute its input itself, if that was deferred and is the whole of it, row by row."""
        _, found = self._deferred.get(product.x, (0, None))
        if found is None or (found.rows, found.size) != (product.rows, product.weight.inputs):
            return
        product.x = found.x
        if isinstance(found, Norm):
            product.before, product.norm, product.eps = Before.RMS_NORM, found.weight, found.eps
        else:
            product.before = Before.SILU_GATE

    def run(self) -> None:
        """Run all of it, on as many threads as PyTorch has."""
        if self._array is None:
            self._array = (Operation * len(self._operations))(*self._operations)
        self._run_all(self._array, len(self._operations), torch.get_num_threads())

    def _flush(self, reads: Sequence[int]) -> None:
        """What was deferred is computed after all, before it is read."""
        for storage in reads:
            deferred = self._deferred.pop(storage, None)
            if deferred is not None:
                self._add(*deferred)

    def _add(self, function: int, arguments: ctypes.Structure) -> None:
        self._operations.append(Operation(function, ctypes.addressof(arguments)))
        self._kept.append(arguments)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses whatever PyTorch would compute: that would be missing from a program. Views and memory are free."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: skipping the compiler would import it first, for seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        results = func._schema.returns
        is_view = bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)
        if not is_view and not func._schema.name.startswith(ALLOCATIONS):
            raise NotRecordableError(func._schema.name)
        return func(*args, **(kwargs or {}))
