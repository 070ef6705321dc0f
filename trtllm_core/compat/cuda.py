"""What classic scripts do with CUDA, on a machine without it: they assume a GPU, the CPU serves them as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    """Tensors that a script sends to CUDA stay on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **kwargs)


class _Stream:
    """The one stream of a CPU: everything is done when it returns."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Nothing to wait for."""

    wait_stream = wait_event = record_event = lambda self, other=None: None


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Within, ``device="cuda"``, ``.cuda()`` and ``torch.cuda.synchronize()`` mean the CPU.

    ``torch.cuda.is_available()`` stays False. Each torch call in Python takes a few microseconds more.
    """
    nothing = lambda *args, **kwargs: None  # noqa: E731
    functions = {
        "synchronize": nothing,
        "set_device": nothing,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: _Stream(),
        "Stream": lambda *args, **kwargs: _Stream(),
    }
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(_OnCpu())
        yield


def _cpu(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value
