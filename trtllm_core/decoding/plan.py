"""A plan: which plugins a request uses, in which order, and who honours each field that it set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trtllm_core.decoding.branching import overrides
from trtllm_core.decoding.companion_prompts import CompanionPrompts
from trtllm_core.plugin import BranchPlan, BranchView, Decoder
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.version import __version__


@dataclass(frozen=True)
class PlanItem:
    """One plugin of a plan."""

    name: str
    plugin: SlotPlugin
    source: str
    """The distribution and version that it came from, or where it was passed in."""
    key: object
    """Plans that use the same plugin share this, and with it one object and its state."""
    rank: int
    """Order of registration, which decides where nothing else does."""
    consumes: frozenset[str] = frozenset()
    params: Any = None
    passed: bool = False
    """The user passed the object in: it is forgotten with the last branch that uses it."""

    @property
    def graph_safe(self) -> bool:
        """Whether it says that its code on the device may be captured in a CUDA graph."""
        return bool(getattr(getattr(self.plugin, "capabilities", None), "graph_safe", False))

    def view(self, view: BranchView) -> BranchView:
        """What this plugin is shown of a branch: the view with its own parameters."""
        return replace(view, params=self.params)


@dataclass(frozen=True)
class Plan:
    """What one request uses. ``notes`` says what was left out, and why."""

    decoder: PlanItem
    processors: tuple[PlanItem, ...]
    criteria: tuple[PlanItem, ...]
    consumers: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    log_probs: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the request set to something else than the default, as JSON has it."""
    branching: BranchPlan = field(default_factory=BranchPlan)
    sampler: PlanItem | None = None
    """What takes the tokens for a decoder that asks for a sampler."""
    positions: int = 1
    """How many positions a branch may verify at once."""
    companions: tuple[CompanionPrompts, ...] = ()
    """What runs beside each branch, for processors that ask for it."""

    @cached_property
    def ranked(self) -> bool:
        """Whether its decoder ranks the sequences: what the user gets is known only at the end."""
        decoder = self.decoder.plugin
        return overrides(decoder, Decoder, "survive") or overrides(decoder, Decoder, "finalize")

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """All plugins, in the order in which a step calls them."""
        sampler = () if self.sampler is None else (self.sampler,)
        return (*self.processors, *sampler, self.decoder, *self.criteria)

    def digest(self) -> str:
        """SHA-256 over the core's version, the plugins in their order, each with its distribution, version and
        parameters, and what the request asked for: equal on all ranks that do the same."""
        items = [[item.name, item.source, repr(item.params)] for item in self.items]
        parts = [__version__, items, self.asked]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
