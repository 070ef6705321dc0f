"""Inner tensors as outputs of a graph: what the modules give that a build names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trtllm_core.errors import ConfigError, listing


def watched_modules(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The modules inside that a pattern names, such as ``layers.*``: ``*`` stands for anything but a dot.

    Raises:
        ConfigError: a pattern names none.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            tops = listing(name for name, _ in module.named_children())
            raise ConfigError(
                f"debug_tensors names {pattern!r}, and the model has no such module; it begins with {tops}"
            )
    return tuple(name for name in names if any(_fits(name, pattern) for pattern in patterns))


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


@contextmanager
def watching(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Until it ends, what was yielded has what each of the modules gave last, by its name."""
    found: dict[str, torch.Tensor] = {}

    def kept(name: str, forward: Any) -> Any:
        def keep(*args: Any) -> Any:
            out = forward(*args)
            found[name] = (out[0] if isinstance(out, tuple) else out).clone()
            return out

        return keep

    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.forward = kept(name, layer.forward)  # no hook: see ``trtllm_core.nn.Layer``
    try:
        yield found
    finally:
        for layer in layers.values():
            del layer.forward


def check_watched(proto: Any, names: Sequence[str]) -> None:
    """Refuse what is no tensor of each token, which is all that executables have room for.

    Raises:
        ConfigError: naming the module.
    """
    outputs = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.output}
    for name in names:
        sizes = [size.dim_param or size.dim_value for size in outputs[name]]
        if sizes[:2] != ["batch", "tokens"] or not all(isinstance(size, int) for size in sizes[2:]):
            raise ConfigError(f"debug_tensors names {name!r}, whose output {sizes} does not belong to tokens")
