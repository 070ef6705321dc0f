"""What a backend can tell of a serialised engine without running it: its parts, and what is wrong with it here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trtllm_core.plugin.backend import TensorSpec

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of a tensor in one profile."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of one kind."""

    kind: str
    count: int
    names: tuple[str, ...] = ()
    """Empty where only their number is known."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A weight as it lies on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one rank's engine is made of."""

    told_by: str
    """Who says so: one sentence, and where that is not the engine itself, why."""
    tensors: tuple[TensorSpec, ...] = ()
    """Inputs and outputs."""
    layers: tuple[LayerGroup, ...] = ()
    profiles: tuple[Mapping[str, Bounds], ...] = ()
    """Optimisation profiles, by input; only of backends that have them."""
    weights: tuple[StoredTensor, ...] = ()
    """Those that lie in files of their own, or in the engine's where that can be read."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes that the backend knows of beside weights and KV cache, such as activations of a profile."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the backend says, as plain JSON."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    what: str
    found: str
    """What was found and, unless all is well, what to do."""


def group_layers(layers: Iterable[tuple[str, str]]) -> tuple[LayerGroup, ...]:
    """``(name, kind)`` of each layer, by kind: the most frequent first."""
    groups: dict[str, list[str]] = {}
    for name, kind in layers:
        groups.setdefault(kind, []).append(name)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(LayerGroup(kind, len(names), tuple(names)) for kind, names in ordered)
