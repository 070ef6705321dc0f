"""``Block`` and ``BlocksManager`` of the classic runtime, for scripts that hand out blocks themselves."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from trtllm_core.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from trtllm_core.kv_cache.manager import GenerationSequence


class Block:
    """One block of the pool, and how many owners (one a beam) link to it."""

    def __init__(self, block_idx: int) -> None:
        self.idx = block_idx
        self.ref_count = 0

    def add_link(self) -> None:
        """One more owner."""
        self.ref_count += 1

    def remove_link(self) -> None:
        """One owner less; ConfigError where there is none."""
        if not self.ref_count:
            raise ConfigError(f"block {self.idx} was given back more often than it was taken")
        self.ref_count -= 1

    def has_link(self) -> bool:
        """Whether somebody owns it."""
        return self.ref_count > 0

    def is_shared(self) -> bool:
        """Whether it has more than one owner: then nobody may write it."""
        return self.ref_count > 1


class BlocksManager:
    """Hands blocks to owners, a list of blocks for each beam of an owner. ``block_size`` is in elements, per K or V.

    A call that raises changes nothing. (The classic class allocated some beams' blocks before it noticed that there
    were none left for the others.)
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, max_blocks_per_seq: int = 128, beam_width: int = 1
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_blocks_per_seq = max_blocks_per_seq
        self.beam_width = beam_width
        self.free_blocks = [Block(index) for index in range(num_blocks)]
        self.allocated_blocks: dict[Hashable, list[list[Block]]] = {}
        """By owner, in the order in which they came: for each beam its blocks."""

    def has_free_block(self) -> bool:
        """Whether there is a block that nobody owns."""
        return bool(self.free_blocks)

    def allocate(self, owner: GenerationSequence, share_across_beam: bool = False) -> None:
        """Append one block to each beam of ``owner``, all of them the same one if ``share_across_beam``.

        Raises:
            CapacityError: (a ``RuntimeError``) there are too few free blocks, or the owner has ``max_blocks_per_seq``.
        """
        if owner in self.allocated_blocks and self.get_number_blocks(owner) >= self.max_blocks_per_seq:
            raise CapacityError(f"{owner} has all max_blocks_per_seq = {self.max_blocks_per_seq} blocks already")
        blocks = self._take(1 if share_across_beam else self.beam_width)
        beams = self.allocated_blocks.setdefault(owner, [[] for _ in range(self.beam_width)])
        for beam, block in zip(beams, blocks * self.beam_width if share_across_beam else blocks, strict=True):
            block.add_link()
            beam.append(block)

    def replace_shared_block(self, owner: GenerationSequence, block_idx: int) -> None:
        """Give each beam of ``owner`` a block of its own at place ``block_idx``; the last sharer keeps the old one.

        The contents are not copied: whoever needs them copies them.

        Raises:
            CapacityError: (a ``RuntimeError``) there are too few free blocks.
        """
        beams = self.allocated_blocks[owner]
        shared: dict[int, list[list[Block]]] = {}
        for beam in beams:
            if beam[block_idx].is_shared():
                shared.setdefault(beam[block_idx].idx, []).append(beam)
        # Where all the links are this owner's beams, the last of them may keep the block.
        movers: list[list[Block]] = []
        for group in shared.values():
            movers += group[:-1] if len(group) == group[0][block_idx].ref_count else group
        for beam, block in zip(movers, self._take(len(movers)), strict=True):
            beam[block_idx].remove_link()
            block.add_link()
            beam[block_idx] = block

    def free(self, owner: GenerationSequence) -> None:
        """Give back all blocks of ``owner``; ConfigError where it has none (it was freed before)."""
        if owner not in self.allocated_blocks:
            raise ConfigError(f"{owner} has no blocks to free")
        for beam in self.allocated_blocks.pop(owner):
            for block in beam:
                block.remove_link()
                if not block.has_link():
                    self.free_blocks.append(block)

    def get_number_blocks(self, owner: GenerationSequence) -> int:
        """Blocks of each beam of ``owner``."""
        return len(self.allocated_blocks[owner][0])

    def get_k_or_v_block_offset(self, block_idx: int, field_idx: int) -> int:
        """Place of a block's keys (``field_idx`` 0) or values (1) in layer 0, in units of ``block_size``."""
        return block_idx * self.num_layers * 2 + field_idx

    def get_offset_array(self, beam_width: int) -> torch.Tensor:
        """int32 ``[owners, beam_width, 2, max_blocks_per_seq]`` of block offsets, 0 where there is no block."""
        if not 1 <= beam_width <= self.beam_width:
            raise ConfigError(f"beam_width must be 1 to {self.beam_width}, got {beam_width}")
        offsets = torch.zeros(len(self.allocated_blocks), beam_width, 2, self.max_blocks_per_seq, dtype=torch.int32)
        for row, beams in enumerate(self.allocated_blocks.values()):
            for beam, blocks in enumerate(beams[:beam_width]):
                indices = torch.tensor([block.idx for block in blocks], dtype=torch.int32)
                offsets[row, beam, :, : len(blocks)] = block_offsets(indices, self.num_layers)
        return offsets

    def get_continuous_caches(self, memory_pool: torch.Tensor) -> torch.Tensor:
        """Layer 0 of each owner's cache in one piece, for debugging: ``[owners, 2, max_blocks_per_seq * block_size]``.

        ``memory_pool`` is any view of the pool's ``num_blocks * num_layers * 2 * block_size`` elements. Zeros where
        there is no block. ConfigError with more than one beam.
        """
        if self.beam_width != 1:
            raise ConfigError(f"get_continuous_caches is for beam width 1, this manager has {self.beam_width}")
        parts = memory_pool.reshape(-1, self.block_size)
        caches = parts.new_zeros(len(self.allocated_blocks), 2, self.max_blocks_per_seq, self.block_size)
        for row, (blocks,) in enumerate(self.allocated_blocks.values()):
            for place, block in enumerate(blocks):
                for field in range(2):
                    caches[row, field, place] = parts[self.get_k_or_v_block_offset(block.idx, field)]
        return caches.flatten(2)

    def _take(self, count: int) -> list[Block]:
        if count > len(self.free_blocks):
            raise CapacityError(
                f"Can't allocate new block for KV cache: {count} needed, "
                f"{len(self.free_blocks)} of {self.num_blocks} free"
            )
        taken, self.free_blocks = self.free_blocks[:count], self.free_blocks[count:]
        return taken


def block_offsets(blocks: torch.Tensor, num_layers: int) -> torch.Tensor:
    """int32 ``[..., 2, n]`` of offsets in layer 0 (keys, then values) of int32 ``[..., n]`` block numbers."""
    keys = blocks * (num_layers * 2)
    return torch.stack((keys, keys + 1), dim=-2)
