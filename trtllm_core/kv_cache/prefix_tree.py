"""The tree of kept prefixes: which full blocks hold which tokens, and which of them goes when room is needed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from trtllm_core.kv_cache.blocks import BlockPool, require
from trtllm_core.kv_cache.host_tier import HostTier
from trtllm_core.plugin.eviction import CachedBlock, EvictionOrder

Ids = npt.NDArray[np.int32]


class KeepingPool(BlockPool):
    """A block pool in which the tree is one more owner of the blocks that it keeps.

    So nobody writes a block that the tree keeps, and a block that no slot holds stays. It is *idle* then: it counts as
    available, and ``take`` has the tree give one up when nothing is free.
    """

    def __init__(self, num_blocks: int, give_up: Callable[[], None], on_idle: Callable[[Iterable[int]], None]) -> None:
        super().__init__(num_blocks)
        self.kept: npt.NDArray[np.bool_] = np.zeros(num_blocks, dtype=np.bool_)
        """bool ``[num_blocks]``: the tree owns it, too."""
        self.idle = 0
        """Blocks that the tree alone owns."""
        self.taken = 0
        """How often a block was taken."""
        self._give_up = give_up
        self._on_idle = on_idle

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give."""
        return self.free + self.idle

    def take(self, hint: int = -1) -> int:
        """See :meth:`BlockPool.take`."""
        if not self.free and self.idle:
            self._give_up()
        self.taken += 1
        return super().take(hint)

    def share(self, blocks: npt.NDArray[np.int32]) -> None:
        """See :meth:`BlockPool.share`."""
        self.idle -= len(np.unique(blocks[self._are_idle(blocks)]))
        super().share(blocks)

    def drop(self, blocks: npt.NDArray[np.int32]) -> None:
        """See :meth:`BlockPool.drop`. No slot drops what it does not hold: what is idle now was not before."""
        super().drop(blocks)
        self._now_idle(dict.fromkeys(blocks[self._are_idle(blocks)].tolist()))

    def unshare(self, block: int) -> None:
        """See :meth:`BlockPool.unshare`."""
        super().unshare(block)
        if self.kept[block] and self.refs[block] == 1:
            self._now_idle([block])

    def keep(self, block: int) -> None:
        """The tree owns a block that a slot holds."""
        self.kept[block] = True
        self.refs[block] += 1

    def forget(self, block: int) -> None:
        """The tree does not own a block any more. Where no slot holds it, it is free."""
        self.idle -= int(self.refs[block] == 1)
        self.kept[block] = False
        super().drop(np.array([block], np.int32))

    def check(self) -> None:
        """See :meth:`BlockPool.check`."""
        super().check()
        idle = int((self.kept & (self.refs == 1)).sum())
        require(self.idle == idle, f"{self.idle} blocks count as idle, but the tree alone owns {idle}")
        require(bool((self.refs[self.kept] > 0).all()), "a kept block has no owner")

    def _are_idle(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        idle: npt.NDArray[np.bool_] = self.kept[blocks] & (self.refs[blocks] == 1)
        return idle

    def _now_idle(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        self.idle += len(blocks)
        if blocks:
            self._on_idle(blocks)


@dataclass(eq=False, slots=True)
class Node(CachedBlock):
    """A block in the tree, or without a parent the root of all prefixes under one extra key.

    What continues a block that is in the pool may be in the host's memory alone, never the other way round.
    """

    block: int = -1
    """In the pool; -1: it is not there."""
    key: bytes = b""
    """Its tokens, int32."""
    extra: tuple[Any, ...] = ()
    parent: Node | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    alive: bool = True
    """False once it was given up."""
    place: int = -1
    """In the host's memory; -1: it is not there."""
    resident: int = 0
    """Children in the pool."""


class PrefixTree:
    """Full blocks under the tokens that they hold, each below the block that it continues.

    Keys are the tokens themselves, not hashes of them: a hit is never somebody else's text.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, order: EvictionOrder, places: int = 0) -> None:
        self.host = HostTier(places)
        self.pool = KeepingPool(num_blocks, self._evict, self._queue)
        self.clock = 0
        self._size = tokens_per_block
        self._order = order
        self._roots: dict[tuple[Any, ...], Node] = {}
        self._nodes: list[Node | None] = [None] * num_blocks
        self._heap: list[tuple[Any, int, Node]] = []
        self._serial = count()

    def root(self, extra: tuple[Any, ...]) -> Node:
        """Where the prefixes under an extra key begin."""
        return self._roots.get(extra) or Node(0, self.clock, self.clock, extra=extra)

    def find(self, extra: tuple[Any, ...], tokens: Ids, most: int) -> list[Node]:
        """The longest kept prefix of ``tokens`` that has no more than ``most``: its root and its blocks, in order."""
        path = [self.root(extra)]
        for end in range(self._size, most + 1, self._size):
            node = path[-1].children.get(tokens[end - self._size : end].tobytes())
            if node is None:
                break
            path.append(node)
        return path

    def nearest(self, node: Node, tokens: Ids) -> tuple[Node | None, int]:
        """The block after ``node`` that begins with most of ``tokens`` (fewer than a block, or a block that is not
        there), and how many that are."""
        if not node.resident or not len(tokens):
            return None, 0
        children = [child for child in node.children.values() if child.block >= 0]
        tokens = tokens[: self._size]
        held = np.frombuffer(b"".join(child.key for child in children), np.int32)
        equal = (held.reshape(-1, self._size)[:, : len(tokens)] == tokens).cumprod(axis=1).sum(axis=1)
        best = int(equal.argmax())
        return children[best], int(equal[best])

    def add(self, parent: Node, tokens: bytes, block: int, priority: int) -> Node | None:
        """Keep ``block``, which a slot holds and has filled, after ``parent``. Where another block holds the same, that
        one stays and this one is not kept. None: ``parent`` is not in the pool any more, nothing can follow it."""
        if parent.parent is None:
            parent = self._roots.setdefault(parent.extra, parent)
        elif parent.block < 0:
            return None
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(
                parent.depth + 1, self.clock, self.clock, 0, priority, key=tokens, parent=parent
            )
        if node.block < 0:
            self._put(node, block)
        node.priority = max(node.priority, priority)
        return node

    def use(self, nodes: Iterable[Node], priority: int) -> None:
        """A request found these blocks."""
        for node in nodes:
            node.uses += 1
            node.last_used = self.clock
            node.priority = max(node.priority, priority)

    def touch(self, node: Node | None) -> None:
        """A slot lets go of a sequence that ends with ``node``."""
        while node is not None and node.parent is not None:
            node.last_used = self.clock
            node = node.parent

    def discard(self, node: Node | None, depth: int) -> None:
        """Give up the end of a sequence, down to ``depth`` blocks, as far as nobody else uses it."""
        while node is not None and node.depth > depth and node.alive and not node.children:
            if node.block >= 0 and self.pool.refs[node.block] != 1:
                return
            parent = node.parent
            self._remove(node)
            node = parent

    def load(self, nodes: list[Node], draw: Callable[[], int]) -> tuple[tuple[int, int], ...]:
        """Bring the end of a path back to the pool, into blocks that ``draw`` gives a slot: (place, block) of each."""
        self.host.hold(nodes)  # drawing may give up blocks, which look for a place
        for node in nodes:
            self._put(node, draw())
        self.host.let_go(nodes)
        return tuple((node.place, node.block) for node in nodes)

    def give_up(self, blocks: int) -> int:
        """Give up as many idle blocks, or all that there are. Returns how many."""
        blocks = min(blocks, self.pool.idle)
        for _ in range(blocks):
            self._evict()
        return blocks

    def check(self) -> None:
        """Raise ``AssertionError`` where tree and pool disagree."""
        nodes = [node for root in self._roots.values() for node in self._below(root)]
        found = {node.block: node for node in nodes if node.block >= 0}
        self.host.check()
        require({node for node in nodes if node.place >= 0} == set(self.host.nodes), "places have other owners")
        for node in nodes:
            require(node.block >= 0 or node.place >= 0, "the tree holds a block that is nowhere")
            require(node.resident == sum(child.block >= 0 for child in node.children.values()), "children were lost")
            require(node.block >= 0 or not node.resident, "a block is in the pool without the one that it continues")
        require(sorted(found) == np.flatnonzero(self.pool.kept).tolist(), "what is kept is not what the tree holds")
        queued = {id(node) for _, _, node in self._heap}
        for block, node in found.items():
            require(self._nodes[block] is node and node.alive, f"block {block} is not the one that the tree knows")
            require(node.parent is not None and node.parent.children[node.key] is node, f"block {block} hangs nowhere")
            require(not self._may_go(node) or id(node) in queued, f"block {block} would never be given up")
        require(all(root.children for root in self._roots.values()), "an empty root was kept")

    @staticmethod
    def _below(node: Node) -> Iterator[Node]:
        todo = [node]
        while todo:
            children = list(todo.pop().children.values())
            yield from children
            todo += children

    def _queue(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            node = self._nodes[block]
            assert node is not None
            if not node.resident:
                heapq.heappush(self._heap, (self._order.key(node), next(self._serial), node))
        if len(self._heap) > 64 + 4 * len(self._nodes):  # most entries are stale: their blocks were taken up again
            idle = {id(node): node for _, _, node in self._heap if self._may_go(node)}
            self._heap = [(self._order.key(node), next(self._serial), node) for node in idle.values()]
            heapq.heapify(self._heap)

    def _may_go(self, node: Node) -> bool:
        return node.block >= 0 and not node.resident and self.pool.refs[node.block] == 1

    def _evict(self) -> None:
        """Give up one idle block: the first in order of those that no kept block continues."""
        later = len(self._heap)  # a bound, for orders whose keys change all the time
        while self._heap:
            key, serial, node = heapq.heappop(self._heap)
            if not self._may_go(node):
                continue
            now = self._order.key(node)
            if now != key and later:
                later -= 1
                heapq.heappush(self._heap, (now, serial, node))
                continue
            self._save(node)
            return
        # What continues each idle block is held by slots, which computed the idle block a second time for themselves.
        node_or_none = self._nodes[int(np.flatnonzero(self.pool.kept & (self.pool.refs == 1))[0])]
        assert node_or_none is not None
        self._remove(node_or_none)

    def _put(self, node: Node, block: int) -> None:
        """A slot has filled ``block``, or will load it, with what the node stands for."""
        assert node.parent is not None
        node.block, self._nodes[block] = block, node
        node.parent.resident += 1
        self.pool.keep(block)

    def _leave(self, node: Node) -> None:
        """The node's block is the tree's no more."""
        if node.block < 0:
            return
        assert node.parent is not None
        self._nodes[node.block] = None
        self.pool.forget(node.block)
        node.block = -1
        node.parent.resident -= 1
        if node.parent.alive and self._may_go(node.parent):
            self._queue([node.parent.block])

    def _save(self, node: Node) -> None:
        """Give up a block that no block in the pool continues: to the host, if that has a place or can make one."""
        oldest = self.host.oldest()
        if node.place < 0 and not self.host.free_place() and oldest is not None:
            if oldest.block >= 0:
                self.host.forget(oldest)
            else:
                self._remove(oldest)
        if node.place >= 0 or self.host.free_place():
            self.host.save(node)
            self._leave(node)
        else:
            self._remove(node)

    def _remove(self, node: Node) -> None:
        """Take a block and all that continues it out of the tree. Blocks that slots hold stay theirs."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        below = [*self._below(node), node]
        for gone in below:
            gone.alive = False
        for gone in below:
            self._leave(gone)
            self.host.forget(gone)
            gone.children = {}
        if parent.parent is None and not parent.children:
            del self._roots[parent.extra]
