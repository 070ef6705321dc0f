"""The built-in eviction orders, and how an order is found by name."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from trtllm_core.errors import ConfigError, listing
from trtllm_core.plugin.eviction import CachedBlock, EvictionOrder


class LeastRecentlyUsed(EvictionOrder):
    """``lru``: what was not used for the longest time. Of one sequence the end goes first."""

    def key(self, block: CachedBlock) -> Any:
        """See :meth:`EvictionOrder.key`."""
        return block.last_used, -block.depth


class LeastFrequentlyUsed(EvictionOrder):
    """``lfu``: what was found in the cache least often."""

    def key(self, block: CachedBlock) -> Any:
        """See :meth:`EvictionOrder.key`."""
        return block.uses, block.last_used, -block.depth


class FirstIn(EvictionOrder):
    """``fifo``: what was computed first, used or not."""

    def key(self, block: CachedBlock) -> Any:
        """See :meth:`EvictionOrder.key`."""
        return block.created, -block.depth


class LowestPriority(EvictionOrder):
    """``priority``: what requests gave the lowest ``cache_priority``, and then the least recently used."""

    honours_priority: ClassVar[bool] = True

    def key(self, block: CachedBlock) -> Any:
        """See :meth:`EvictionOrder.key`."""
        return block.priority, block.last_used, -block.depth


ORDERS: dict[str, type[EvictionOrder]] = {
    "fifo": FirstIn,
    "lfu": LeastFrequentlyUsed,
    "lru": LeastRecentlyUsed,
    "priority": LowestPriority,
}


def make_order(chosen: str | type[EvictionOrder]) -> EvictionOrder:
    """An order by name, by reference ``"package.module:Class"``, or as a class.

    Raises:
        ConfigError: there is no such order, it could not be imported, or it is none.
    """
    if not isinstance(chosen, str):
        return chosen()
    module, colon, name = chosen.partition(":")
    if not colon:
        if chosen not in ORDERS:
            raise ConfigError(
                f"there is no eviction order {chosen!r}: choose {listing(ORDERS)}, or "
                "name a class as 'package.module:Class'"
            )
        return ORDERS[chosen]()
    try:
        order = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise ConfigError(f"eviction order {chosen!r} could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(order, EvictionOrder):
        raise ConfigError(f"eviction order {chosen!r} is a {type(order).__name__}, not an EvictionOrder")
    return order
