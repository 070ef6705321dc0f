"""A parsed TensorRT network as a graph: what a tensor is made from, and where attention and caches are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class NetworkGraph:
    """Answers questions about an ``INetworkDefinition``. Needs no GPU.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        network: as the ONNX parser filled it.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt = trt
        self.layers = [network.get_layer(i) for i in range(network.num_layers)]
        self.inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
        self.outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
        self._maker = {layer.get_output(i).name: layer for layer in self.layers for i in range(layer.num_outputs)}

    def maker(self, tensor: Any) -> Any | None:
        """The layer that a tensor is an output of; None for an input of the network."""
        return self._maker.get(tensor.name)

    def of_type(self, kind: str) -> list[Any]:
        """The layers of one ``LayerType``, by its name."""
        wanted = getattr(self._trt.LayerType, kind)
        return [layer for layer in self.layers if layer.type == wanted]

    def attentions(self) -> list[Any]:
        """The network's ``IAttention`` objects, in order."""
        found = self.of_type("ATTENTION_INPUT")
        for layer in found:
            layer.__class__ = self._trt.IAttentionInputLayer  # get_layer gives the base class; so it is cast down
        return [layer.attention for layer in found]

    def sources(self, tensor: Any, stop: frozenset[str] = frozenset()) -> set[str]:
        """The network inputs whose *values* a tensor depends on, and of ``stop`` those on the way, not looked behind.

        A shape is no value: what only its shape is read of does not count.
        """
        return {one.name for one in self._walk(tensor, stop) if one.name in stop or self.maker(one) is None}

    def _walk(self, tensor: Any, stop: frozenset[str]) -> Iterator[Any]:
        seen: set[str] = set()
        left = [tensor]
        while left:
            one = left.pop()
            if one is None or one.name in seen:
                continue
            seen.add(one.name)
            yield one
            layer = self.maker(one)
            if layer is None or one.name in stop or layer.type == self._trt.LayerType.SHAPE:
                continue
            left += [layer.get_input(i) for i in range(layer.num_inputs)]
