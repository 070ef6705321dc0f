"""The block pool: who owns how much of which block, and what is free. It knows no slots and no tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtllm_core.errors import ConfigError

_ONE = np.int32(1)
"""``ufunc.at`` is sixty times slower with a number of another type."""


class BlockPool:
    """Reference counts of ``num_blocks`` blocks and a free list. A block is free when nobody counts it.

    Reference counts are a NumPy array, because a beam step shares and drops thousands of blocks at once. The free list
    is a stack in which entries may be stale: a block that was taken by name stays on it, and is skipped when it
    comes up. So both "any free block" and "this block, if it is free" take constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.refs: npt.NDArray[np.int32] = np.zeros(num_blocks, dtype=np.int32)
        """int32 ``[num_blocks]``: owners of each block. Only ``drop`` may take the last one away."""
        self.free = num_blocks
        """Number of free blocks."""
        self._stack = list(range(num_blocks - 1, -1, -1))
        self._stacked = bytearray(b"\1" * num_blocks)

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give."""
        return self.free

    def take(self, hint: int = -1) -> int:
        """A free block, now with one owner: block ``hint`` if that is free, so that runs of neighbours arise.

        Raises:
            ConfigError: none is free. Callers count first, so that a failing call changes nothing.
        """
        refs = self.refs
        block = hint
        if not (0 <= block < len(refs) and refs[block] == 0):
            if not self.free:
                raise ConfigError("the block pool is empty: a block was taken without counting the free ones first")
            block = self._pop()
            while refs[block]:
                block = self._pop()
        refs[block] = 1
        self.free -= 1
        return block

    def share(self, blocks: npt.NDArray[np.int32]) -> None:
        """One more owner for each entry of ``blocks`` (a block may stand there more than once)."""
        np.add.at(self.refs, blocks, _ONE)

    def drop(self, blocks: npt.NDArray[np.int32]) -> None:
        """One owner less for each entry of ``blocks``; those without an owner are free."""
        np.subtract.at(self.refs, blocks, _ONE)
        freed = dict.fromkeys(blocks[self.refs[blocks] == 0].tolist())
        self.free += len(freed)
        for block in reversed(freed):
            if not self._stacked[block]:
                self._stacked[block] = 1
                self._stack.append(block)

    def unshare(self, block: int) -> None:
        """One owner less for a block that has more."""
        self.refs[block] -= 1

    def check(self) -> None:
        """Raise ``AssertionError`` where the free list and the reference counts disagree."""
        require(bool((self.refs >= 0).all()), "a block was given back more often than it was taken")
        unowned = np.flatnonzero(self.refs == 0).tolist()
        require(self.free == len(unowned), f"{self.free} blocks count as free, but {len(unowned)} have no owner")
        require(set(unowned) <= set(self._stack), "a block without owner is missing from the free list: it leaked")
        require(len(set(self._stack)) == len(self._stack), "a block is on the free list twice")

    def _pop(self) -> int:
        block = self._stack.pop()
        self._stacked[block] = 0
        return block


def require(holds: bool, otherwise: str) -> None:
    """``assert`` that ``python -O`` keeps: integrity checks are asked for, and must then be made."""
    if not holds:
        raise AssertionError(otherwise)
