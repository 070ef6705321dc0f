"""The prefix policy: the paged policy, which keeps what was computed and gives it to requests that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trtllm_core.errors import CapacityError
from trtllm_core.kv_cache.blocks import require
from trtllm_core.kv_cache.options import BlockOptions, PrefixOptions
from trtllm_core.kv_cache.orders import make_order
from trtllm_core.kv_cache.paged import PagedPolicy
from trtllm_core.kv_cache.prefix_tree import Ids, Node, PrefixTree
from trtllm_core.kv_cache.slots import Counts
from trtllm_core.plugin.kv_policy import Admission, Edits, KVBudget, KVModel, KVPlan, KVUsage, Placement

_NO_BLOCKS = np.empty(0, np.int32)


class PrefixPolicy(PagedPolicy):
    """As :class:`PagedPolicy`, without a ring; besides:

    **Reuse.** Every block that is full and whose tokens are known is kept in a tree, under its tokens, those before it
    and the request's extra key. A request starts after the longest kept prefix of its prompt: it shares the full
    blocks, and gets a copy of one of which it can use the beginning. At least one token is left for it to compute.

    **Room.** Kept blocks that no slot holds are available like free ones, and are given up in the eviction order, the
    end of a sequence first. A request is promised what it may need beyond the blocks that it shares, and shared blocks
    are counted once. The promise holds while nobody takes back tokens that others reuse.

    **Host.** With ``host_tokens``, what is given up goes to the host's memory, and is copied back when it is found. Of
    what lies there, what was given up first goes first.

    **Waiting.** Of requests that begin alike one computes, and the others are admitted when they can share.
    """

    Options: ClassVar[type[BlockOptions]] = PrefixOptions
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __init__(self, options: PrefixOptions | None = None) -> None:
        super().__init__(options)
        self._order = make_order(self.options.eviction)
        self.honours_priority = self._order.honours_priority

    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """See :meth:`KVPolicy.plan`."""
        plan = super().plan(model, budget)
        places = self.options.host_tokens // plan.tokens_per_block
        if self.options.host_tokens and not places:
            raise CapacityError(
                f"host_tokens={self.options.host_tokens} do not hold one block of {plan.tokens_per_block} tokens: "
                "raise it, or build with a smaller tokens_per_block"
            )
        plan = replace(plan, host_blocks=places)
        self._tree = PrefixTree(plan.num_blocks, plan.tokens_per_block, self._order, places)
        self._pool = self._tree.pool
        slots = budget.max_slots
        self._covered: Counts = np.zeros(slots, dtype=np.int64)
        """Blocks at the beginning of each table that were found in the cache, and which its promise leaves out."""
        self._node: list[Node | None] = [None] * slots
        """Last full block of each slot in the tree; None: what the slot holds cannot be kept."""
        self._tail: list[list[int]] = [[] for _ in range(slots)]
        """Tokens of each slot after that block."""
        self._priority = [50] * slots
        self._computing: dict[int, tuple[tuple[Any, ...], Ids]] = {}
        """Extra key and prompt of the slots whose prompt is not in the cache yet."""
        return plan

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        max_new_tokens: int,
        extra_key: tuple[Any, ...] = (),
        priority: int = 50,
    ) -> Admission | None:
        """See :meth:`KVPolicy.admit`: None while there is no room, or while another slot computes the same prefix."""
        need, spared = self._need(slot, len(tokens), max_new_tokens)
        ids = np.asarray(tokens, np.int32)
        path = self._tree.find(extra_key, ids, len(ids) - 1)
        if self.options.wait_for_prefix and self._is_computed(extra_key, ids, len(path) * self._tokens_per_block):
            return None
        hits = path[1:]
        blocks = np.array([node.block for node in hits if node.block >= 0], np.int32)
        if need - len(blocks) > self._unpromised(blocks) - spared:
            return None
        self._tree.clock += 1
        self._tree.use(hits, priority)
        self._pool.share(blocks)
        self._table[slot, : len(blocks)] = blocks
        self._held[slot] = self._covered[slot] = len(blocks)
        self._live[slot], self._promised[slot] = True, need
        # Blocks that come back from the host are part of what was promised, like those that will be computed.
        loads = self._tree.load(hits[len(blocks) :], lambda: self._draw(slot, int(self._held[slot]), -1)[1])
        hit = len(hits) * self._tokens_per_block
        part, edits = self._reuse_part(slot, path[-1], ids[hit:-1], priority)
        self._length[slot] = hit + part
        self._limit[slot] = self._limits(np.array([slot]))[0]
        self._node[slot], self._tail[slot] = path[-1], ids[hit : hit + part].tolist()
        self._priority[slot] = priority
        if len(ids):
            self._computing[slot] = extra_key, ids
        return Admission(hit + part, replace(edits, saves=self._tree.host.take_saves(), loads=loads))

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> Placement:
        """See :meth:`PagedPolicy.extend`. Blocks that were given up are saved before anybody writes to new ones."""
        before = self._tree.pool.taken
        placement = super().extend(slots, counts)
        if self._tree.host.saves and self._tree.pool.taken > before:
            edits = replace(placement.edits, saves=self._tree.host.take_saves())
            placement = replace(placement, edits=edits)
        return placement

    def commit(
        self, slots: Sequence[int], counts: Sequence[int], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """See :meth:`KVPolicy.commit`. Blocks that are full now are kept; those of unknown tokens cannot be."""
        super().commit(slots, counts)
        for i, slot in enumerate(slots):
            if not counts[i]:
                continue
            if slot in self._computing and self._length[slot] >= len(self._computing[slot][1]):
                del self._computing[slot]
            if tokens is None:
                self._node[slot] = None
            elif self._node[slot] is not None:
                self._keep(slot, [*self._tail[slot], *tokens[i]])

    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See :meth:`PagedPolicy.rewind`. What was kept stays kept: what is written instead goes to other blocks."""
        super().rewind(slots, counts)
        for slot, n in zip(slots, counts, strict=True):
            if not n:
                continue
            length, node = int(self._length[slot]), self._node[slot]
            full, rest = divmod(length, self._tokens_per_block)
            if node is not None:
                tail = self._tail[slot]
                while node.depth > full:
                    tail = np.frombuffer(node.key, np.int32).tolist()
                    assert node.parent is not None
                    node = node.parent
                self._node[slot], self._tail[slot] = node, tail[:rest]
            self._uncover(slot, full)

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> Edits:
        """See :meth:`PagedPolicy.fork`."""
        live = self._live.copy()
        edits = super().fork(src, dst)
        state = [(self._node[a], list(self._tail[a]), self._priority[a], int(self._covered[a])) for a in src]
        for (node, tail, priority, covered), a, b in zip(state, src, dst, strict=True):
            if a == b:
                continue
            self._node[b], self._tail[b], self._priority[b] = node, tail, priority
            self._computing.pop(b, None)
            if live[b]:
                self._uncover(b, int(self._length[b]) // self._tokens_per_block)
            else:
                self._covered[b] = covered
        return edits

    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """See :meth:`KVPolicy.release`. Without ``keep`` the tree gives up what these slots put there."""
        self._rows(slots)
        self._tree.clock += 1
        for slot in slots:
            self._tree.touch(self._node[slot])
        super().release(slots)
        for slot in slots:
            if not keep:
                self._tree.discard(self._node[slot], int(self._covered[slot]))
            self._node[slot], self._tail[slot], self._covered[slot] = None, [], 0
            self._computing.pop(slot, None)

    def evict(self, blocks: int) -> int:
        """See :meth:`KVPolicy.evict`."""
        return self._tree.give_up(blocks)

    def usage(self) -> KVUsage:
        """See :meth:`KVPolicy.usage`."""
        shared, idle = int((self._owners() > 1).sum()), self._tree.pool.idle
        return KVUsage(len(self._pool), self._pool.available, shared, idle, len(self._tree.host.nodes))

    def check_integrity(self) -> None:
        """See :meth:`KVPolicy.check_integrity`."""
        super().check_integrity()
        self._tree.check()
        for slot in range(len(self._live)):
            full, rest = divmod(int(self._length[slot]), self._tokens_per_block)
            require(self._covered[slot] <= full, f"slot {slot} has more blocks from the cache than full ones")
            node = self._node[slot]
            if node is not None:
                at = (node.depth, len(self._tail[slot]))
                require(at == (full, rest), f"slot {slot} stands at {at} in the tree, but at {(full, rest)}")

    def _window(self, model: KVModel, tokens_per_block: int) -> tuple[int | None, int, int]:
        return None, 0, 0  # what a ring overwrites could not be reused

    def _owners(self) -> npt.NDArray[np.int32]:
        return self._pool.refs - self._tree.pool.kept

    def _unpromised(self, hits: npt.NDArray[np.int32] = _NO_BLOCKS) -> int:
        """As :meth:`PagedPolicy._unpromised`, once a slot holds the blocks ``hits``, too."""
        promised = self._promised > 0
        taken = int((np.maximum(self._promised, self._held) - self._covered)[promised].sum())
        beyond = promised[:, None] & (self._index >= self._covered[:, None])
        held = self._table >= 0
        others = np.zeros(len(self._pool), np.bool_)
        others[self._table[held & ~beyond]] = True
        others[hits] = True
        others[self._table[held & beyond]] = False
        return len(self._pool) - taken - int(others.sum())

    def _is_computed(self, extra: tuple[Any, ...], ids: Ids, found: int) -> bool:
        """Whether a slot is about to compute the block that ends at token ``found`` of a prompt, or most of it."""
        if found >= len(ids) + self.options.partial_blocks:
            return False
        return any(
            other == extra and len(prompt) >= found > self._length[slot] and bool((prompt[:found] == ids[:found]).all())
            for slot, (other, prompt) in self._computing.items()
        )

    def _reuse_part(self, slot: int, node: Node, rest: Ids, priority: int) -> tuple[int, Edits]:
        """Tokens of ``rest`` that a copy of a kept block after ``node`` holds; a short beginning is not worth one."""
        near, part = self._tree.nearest(node, rest) if self.options.partial_blocks else (None, 0)
        if near is None or 4 * part < self._tokens_per_block:
            return 0, Edits()
        self._tree.use([near], priority)
        source = near.block
        _, block = self._draw(slot, int(self._held[slot]), -1)  # the pool may have to give up the source for it
        return part, Edits(((source, block),)) if source != block else Edits()

    def _keep(self, slot: int, tail: list[int]) -> None:
        """The slot's tokens after its last kept block are ``tail``: keep those of them that fill blocks."""
        size, node = self._tokens_per_block, self._node[slot]
        while len(tail) >= size and node is not None:
            key, tail = np.array(tail[:size], np.int32).tobytes(), tail[size:]
            node = self._tree.add(node, key, int(self._table[slot, node.depth]), self._priority[slot])
        self._node[slot], self._tail[slot] = node, tail

    def _uncover(self, slot: int, full: int) -> None:
        """Only ``full`` blocks of a slot are full: what it shared beyond is gone, and no part of its promise."""
        less = max(int(self._covered[slot]) - full, 0)
        self._covered[slot] -= less
        self._promised[slot] = max(int(self._promised[slot]) - less, 0)
