"""Watching what device code does to tensors: what would wait for a GPU, and which operations run on which shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = frozenset({"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2"})
"""Operations whose result, or whose shape, is known on the host only once the device has finished."""
COPYING = frozenset({"tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"})
"""Methods of a tensor that bring its values to the host. On the CPU some of them run no operation at all."""

Operation = tuple[str, tuple[tuple[tuple[int, ...], str], ...]]
"""Its name, and shape and dtype of each tensor that it is given."""


class HostWait(AssertionError):  # noqa: N818
    """Device code did what makes the host wait for a GPU."""


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPYING:
            raise HostWait(f"Tensor.{name} waits for the device")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, see: Callable[[str, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def _refuse(name: str, args: Any) -> None:
    if name in WAITING:
        raise HostWait(f"{name} waits for the device")
    if name in ("index", "index_put", "index_put_") and any(
        each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
    ):
        raise HostWait("a mask as an index waits for the device")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, what would make the host wait for a GPU raises ``HostWait``, on the CPU too."""
    with _Calls(), _Operations(_refuse):
        yield


@contextmanager
def operations(seen: list[Operation], method: str = "") -> Iterator[None]:
    """The operations that run inside are added to ``seen``, in order. ``method`` is what is called there."""

    def see(name: str, args: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves(args)
        seen.append((name, tuple((tuple(x.shape), str(x.dtype)) for x in leaves if isinstance(x, torch.Tensor))))

    with _Operations(see):
        yield
