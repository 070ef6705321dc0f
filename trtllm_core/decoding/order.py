"""The order of logits processors: data, not code."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trtllm_core.errors import ConfigError, listing
from trtllm_core.plugin.logits import Phase

if TYPE_CHECKING:
    from trtllm_core.decoding.plan import PlanItem

PHASES: tuple[Phase, ...] = (Phase.BIAS, Phase.TEMPERATURE, Phase.PENALTY, Phase.CONSTRAINT, Phase.TRUNCATION)
"""Preset ``trtllm``: the temperature comes before the penalties, as in the classic runtime."""


def ordered(items: Iterable[PlanItem]) -> list[PlanItem]:
    """Processors by phase, then by what ``before`` and ``after`` demand, then as they were registered.

    Raises:
        ConfigError: the demands contradict each other or the phases.
    """
    items = list(items)
    # Items may share a name: two objects of one class that the user passed in.
    waits: list[set[int]] = [
        {
            j
            for j, other in enumerate(items)
            if other.name in item.plugin.after or item.name in other.plugin.before  # type: ignore[attr-defined]
        }
        for item in items
    ]
    ready = [(_key(item), i) for i, item in enumerate(items) if not waits[i]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for j, others in enumerate(waits):
            if i in others:
                others.discard(i)
                if not others:
                    heapq.heappush(ready, (_key(items[j]), j))
    if len(order) < len(items):
        stuck = listing(items[i].name for i in range(len(items)) if i not in order)
        raise ConfigError(f"logits processors {stuck} cannot be ordered: each must run before the other")
    out = [items[i] for i in order]
    for earlier, later in itertools.pairwise(out):
        if _key(earlier)[0] > _key(later)[0]:
            raise ConfigError(
                f"logits processor {earlier.name!r} (phase {earlier.plugin.phase}) asks to run before "  # type: ignore[attr-defined]
                f"{later.name!r} (phase {later.plugin.phase}), which belongs to an earlier phase"  # type: ignore[attr-defined]
            )
    return out


def _key(item: PlanItem) -> tuple[int, int]:
    return PHASES.index(item.plugin.phase), item.rank  # type: ignore[attr-defined]
