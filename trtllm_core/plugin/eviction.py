"""Base class of eviction orders: which block of a kept prefix a policy gives up first. Pure Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(eq=False, slots=True)
class CachedBlock:
    """What is known of a full block of tokens that is kept for reuse. An eviction order reads it and changes nothing.

    ``created`` and ``last_used`` are readings of one clock that ticks with every admission and release, not seconds.
    """

    depth: int
    """Tokens of its sequence up to the block's end, in blocks: 1 for the first one."""
    created: int
    last_used: int
    """When a slot last took it up or let go of it."""
    uses: int = 0
    """How often a request found it in the cache."""
    priority: int = 50
    """Highest ``SamplingConfig.cache_priority`` of the requests that used it, 0 to 100."""


class EvictionOrder(ABC):
    """Which kept block goes first. One object serves one session.

    A block goes after those that continue it, and never while a slot holds it. Among the others the smallest ``key``
    decides. ``KVCacheConfig(policy="prefix", options={"eviction": "my_package.orders:Mine"})`` chooses an order, by
    the name of a built-in one, by reference, or as the class itself.
    """

    honours_priority: ClassVar[bool] = False
    """Whether ``key`` looks at ``priority``. Requests that set one are refused where it does not."""

    @abstractmethod
    def key(self, block: CachedBlock) -> Any:
        """Anything that can be compared with the keys of other blocks.

        Asked when the last slot lets go of the block, and once more when its turn comes: a key that has changed
        puts it back in line.
        """
