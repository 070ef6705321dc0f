"""The order of logits processors: data, not code."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from trtllm_core.errors import ConfigError, listing
from trtllm_core.plugin.logits import Phase

if TYPE_CHECKING:
    from trtllm_core.decoding.plan import PlanItem


@dataclass(frozen=True)
class Preset:
    """Whose way of choosing tokens a request asks for. Where formulas differ, the built-in processors know."""

    phases: tuple[Phase, ...]
    """The order of the phases."""
    sampler: str
    """The decoder of a request that draws and names none."""
    unscored: frozenset[Phase] = frozenset()
    """Phases, the last ones, that log-probabilities do not see."""
    only_drawn: frozenset[Phase] = frozenset()
    """Phases whose processors a greedy choice does not get by itself, not even for its log-probabilities."""


PRESETS: Mapping[str, Preset] = {
    # The classic runtime: temperature before penalties, and nothing that truncates shows in log-probabilities.
    "trtllm": Preset(
        (Phase.BIAS, Phase.TEMPERATURE, Phase.PENALTY, Phase.CONSTRAINT, Phase.TRUNCATION),
        "top_k_top_p",
        unscored=frozenset({Phase.TRUNCATION}),
    ),
    # transformers: its warpers come last, in this order, and only where a token is drawn.
    "hf": Preset(
        (Phase.BIAS, Phase.PENALTY, Phase.CONSTRAINT, Phase.TEMPERATURE, Phase.TRUNCATION),
        "multinomial",
        only_drawn=frozenset({Phase.TEMPERATURE, Phase.TRUNCATION}),
    ),
}


def ordered(items: Iterable[PlanItem], preset: str) -> list[PlanItem]:
    """Processors by the preset's phases, then by what ``before`` and ``after`` demand, then as they were registered.

    Raises:
        ConfigError: the demands contradict each other or the phases.
    """
    phases = PRESETS[preset].phases

    def key(item: PlanItem) -> tuple[int, int]:
        return phases.index(item.plugin.phase), item.rank  # type: ignore[attr-defined]

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
    ready = [(key(item), i) for i, item in enumerate(items) if not waits[i]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for j, others in enumerate(waits):
            if i in others:
                others.discard(i)
                if not others:
                    heapq.heappush(ready, (key(items[j]), j))
    if len(order) < len(items):
        stuck = listing(items[i].name for i in range(len(items)) if i not in order)
        raise ConfigError(f"logits processors {stuck} cannot be ordered: each must run before the other")
    out = [items[i] for i in order]
    for earlier, later in itertools.pairwise(out):
        if key(earlier)[0] > key(later)[0]:
            raise ConfigError(
                f"logits processor {earlier.name!r} (phase {earlier.plugin.phase}) asks to run before "  # type: ignore[attr-defined]
                f"{later.name!r} (phase {later.plugin.phase}), which belongs to an earlier phase"  # type: ignore[attr-defined]
            )
    return out


def merged(orders: Mapping[str, Sequence[object]]) -> list[tuple[object, frozenset[str]]]:
    """One order for rows of several presets: each entry with the presets whose rows it is for.

    Without the others' entries it is each preset's own order. What has the same place in several is there once.
    """
    result: list[tuple[object, frozenset[str]]] = []
    for preset, order in orders.items():
        matches = SequenceMatcher(None, [key for key, _ in result], order, autojunk=False)
        longer = []
        for tag, a, b, c, d in matches.get_opcodes():
            if tag == "equal":
                longer += [(key, presets | {preset}) for key, presets in result[a:b]]
            else:
                longer += result[a:b] + [(key, frozenset({preset})) for key in order[c:d]]
        result = longer
    return result
