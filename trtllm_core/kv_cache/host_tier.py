"""Which blocks of kept prefixes lie in the host's memory, and which of them goes there when a place is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.kv_cache.blocks import require

if TYPE_CHECKING:
    from trtllm_core.kv_cache.prefix_tree import Node


class HostTier:
    """Places in the host's memory, and who has them, the one that was given up first at the front.

    A block stays in its place while it is in the pool again, so that giving it up a second time costs no copy. What
    continues a block is given up before it, and so leaves its place before it.
    """

    def __init__(self, places: int) -> None:
        self.nodes: dict[Node, None] = {}
        self.saves: list[tuple[int, int]] = []
        """(block, place): copies that are still to be made."""
        self._free = list(range(places - 1, -1, -1))
        self._places = places

    def take_saves(self) -> tuple[tuple[int, int], ...]:
        """The copies that are to be made, once."""
        saves, self.saves = tuple(self.saves), []
        return saves

    def free_place(self) -> bool:
        """Whether there is a place that nobody has."""
        return bool(self._free)

    def oldest(self) -> Node | None:
        """Whose turn it is to go; None: nobody's."""
        return next(iter(self.nodes), None)

    def save(self, node: Node) -> None:
        """A node's block is given up: it takes a free place, unless it has one."""
        if node.place < 0:
            node.place = self._free.pop()
            self.saves.append((node.block, node.place))
        self.nodes.pop(node, None)
        self.nodes[node] = None

    def forget(self, node: Node) -> None:
        """A node needs its place no more."""
        if node.place >= 0:
            self.nodes.pop(node, None)
            self._free.append(node.place)
            node.place = -1

    def hold(self, nodes: list[Node]) -> None:
        """These keep their places until they are ``let_go``: they are being loaded."""
        for node in nodes:
            del self.nodes[node]

    def let_go(self, nodes: list[Node]) -> None:
        """See ``hold``. Ends of sequences stand first."""
        for node in reversed(nodes):
            self.nodes[node] = None

    def check(self) -> None:
        """Raise ``AssertionError`` where a place is lost, or has two owners."""
        taken = [node.place for node in self.nodes]
        require(sorted(taken + self._free) == list(range(self._places)), "places in the host's memory are lost")
