"""What the layers of a module give, for debugging."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LayerWatch:
    """Until it ends, ``found`` has what each member of the module's lists of layers gave last, by its name."""

    def __init__(self, module: nn.Module) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._before: list[tuple[Any, Any]] = []
        for name, layers in module.named_modules():
            if isinstance(layers, nn.ModuleList):
                for index, layer in enumerate(layers):
                    self._before.append((layer, vars(layer).get("forward")))
                    layer.forward = _kept(layer.forward, f"{name}.{index}", self.found)

    def end(self) -> None:
        """The layers are as they were."""
        for layer, forward in reversed(self._before):  # a layer may be in two lists
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _kept(forward: Any, name: str, found: dict[str, torch.Tensor]) -> Any:
    def keep(*args: Any) -> Any:
        out = forward(*args)
        given: torch.Tensor = out[0] if isinstance(out, tuple) else out
        found[name] = given.clone()  # the next layer may write over its residual: see ``RowLinear``
        return out

    return keep
