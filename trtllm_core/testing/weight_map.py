"""Whether a family's weight map is whole: each element of a checkpoint goes to one place, and none stays empty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from trtllm_core.config import ModelConfig
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, Weight


class NumberedCheckpoint:
    """A checkpoint whose elements are numbered instead of trained: float64, no number twice in all tensors.

    Args:
        checkpoint: whose names and shapes it has.
        extra: names of tensors that it has besides.
    """

    def __init__(self, checkpoint: CheckpointView, extra: Sequence[str] = ()) -> None:
        self._checkpoint, self._extra = checkpoint, frozenset(extra)
        self._starts, total = {}, 1
        for name in sorted(checkpoint.names()):
            self._starts[name] = total
            total += torch.Size(checkpoint.shape(name)).numel()

    @property
    def format(self) -> Literal["hf", "gguf"]:
        """See ``CheckpointView``."""
        return self._checkpoint.format

    @property
    def architecture(self) -> str:
        """See ``CheckpointView``."""
        return self._checkpoint.architecture

    @property
    def config(self) -> Mapping[str, Any]:
        """See ``CheckpointView``."""
        return self._checkpoint.config

    def names(self) -> frozenset[str]:
        """See ``CheckpointView``."""
        return self._checkpoint.names() | self._extra

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``CheckpointView``."""
        return self._checkpoint.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See ``CheckpointView``."""
        shape = torch.Size(self.shape(name))
        return torch.arange(self._starts[name], self._starts[name] + shape.numel(), dtype=torch.float64).view(shape)


def check_weights_are_used_once(
    family: ModelFamily, config: ModelConfig, checkpoint: CheckpointView, extra: Sequence[str] = ()
) -> None:
    """Run the weight map on numbered elements.

    Raises:
        CheckpointError: it names a tensor that is not there, or leaves one out.
        AssertionError: an element is left out or used twice.
    """
    numbered = NumberedCheckpoint(checkpoint, extra)
    weights = check_weight_map(family, config, numbered)
    for weight, (_, value) in zip(weights, rank_weights(weights, config, numbered, TensorParallel()), strict=True):
        sources = {piece.source for piece in weight.pieces}
        elements = sum(torch.Size(numbered.shape(source)).numel() for source in sources)
        where = f"parameter {weight.target!r}, made of {', '.join(sorted(sources))}"
        assert value.numel() == elements, f"{where}, has {value.numel()} elements of {elements}"
        assert len(set(value.flatten().tolist())) == elements, f"{where}, has an element twice and lacks another"


def check_module_is_filled(
    family: ModelFamily, config: ModelConfig, checkpoint: CheckpointView, parallel: TensorParallel
) -> None:
    """One rank's parameters: each filled once, in its own shape.

    Raises:
        AssertionError: a parameter is filled twice or never, or has another shape than what fills it.
    """
    with torch.device("meta"):
        module = family.module(config, parallel)
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    weights: Sequence[Weight] = family.weights(config, checkpoint)
    found = defaultdict(list)
    for name, value in rank_weights(weights, config, checkpoint, parallel):
        found[name].append(tuple(value.shape))
    twice = sorted(name for name, shapes in found.items() if len(shapes) > 1)
    assert not twice, f"the weight map fills {', '.join(twice)} more than once"
    empty, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not empty, f"the weight map leaves parameters empty: {', '.join(empty)}"
    assert not unknown, f"the weight map fills what the module does not have: {', '.join(unknown)}"
    for name, (shape,) in found.items():
        assert shape == wanted[name], f"{name} is {wanted[name]} on rank {parallel.rank}, its weights are {shape}"
