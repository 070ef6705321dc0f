"""Where a step asks for tokens, and the drafts that stand before some of these places."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_core.plugin import DecodingContext, LogitsBatch


@dataclass(frozen=True, slots=True)
class Positions:
    """One position a branch, and in a verify step one more behind each of its drafts, in order."""

    slots: list[int]
    """By branch, on the host."""
    slot: torch.Tensor
    """int64 ``[n]``, by position."""
    offset: torch.Tensor
    """int64 ``[n]``: drafts before each position."""
    draft: torch.Tensor | None = None
    """int32 ``[slots, k]``; None: nobody has drafts."""
    starts: torch.Tensor | None = None
    """int64 ``[branches]``: the first position of each; None: nobody has drafts."""
    drafts: Sequence[tuple[int, ...]] | None = None
    """By branch, on the host; None: nobody has any."""

    @property
    def branch(self) -> torch.Tensor:
        """int64 ``[branches]``: the slot of each."""
        return self.slot if self.starts is None else self.slot[self.starts]

    @property
    def slots_by_position(self) -> list[int]:
        """The slot of each position, on the host."""
        if self.drafts is None:
            return self.slots
        return [slot for slot, draft in zip(self.slots, self.drafts, strict=True) for _ in range(len(draft) + 1)]

    def seen_by(self, members: Collection[int]) -> Positions:
        """These, or where none of the slots in ``members`` has drafts the first position of each branch, as in a step
        without any: whoever verifies nothing is spared the drafts of others."""
        if self.starts is None or self.drafts is None:
            return self
        if any(draft and slot in members for slot, draft in zip(self.slots, self.drafts, strict=True)):
            return self
        return Positions(self.slots, self.branch, self.offset[self.starts])

    def batch(self, context: DecodingContext, active: torch.Tensor) -> LogitsBatch:
        """What a plugin is shown whose positions are those that ``active`` (bool ``[n]``) says."""
        return LogitsBatch(context, self.slot, self.offset, active, self.draft, self.starts)

    def source(self, width: int) -> torch.Tensor | None:
        """int64 ``[branches, width]``: the position that the j-th token of each branch is from; None: from its only
        one. Beyond a branch's own positions it is some other."""
        if self.starts is None:
            return None
        place = self.starts.unsqueeze(1) + torch.arange(width, device=self.slot.device)
        return place.clamp_(max=len(self.slot) - 1)


class Drafts:
    """What is proposed for the coming step, by slot."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._tokens = np.zeros((slots, 1), np.int32)
        self.counts = np.zeros(slots, np.int64)
        """int64 ``[slots]``: how many tokens are proposed."""

    def clear(self) -> None:
        """Nothing is proposed."""
        self.counts[:] = 0

    def put(self, slot: int, tokens: Sequence[int]) -> None:
        """Propose ``tokens`` for a slot, instead of anything before."""
        if len(tokens) > self._tokens.shape[1]:
            wider = np.zeros((len(self._tokens), 1 << (len(tokens) - 1).bit_length()), np.int32)
            wider[:, : self._tokens.shape[1]] = self._tokens
            self._tokens = wider
        self._tokens[slot, : len(tokens)] = tokens
        self.counts[slot] = len(tokens)

    def of(self, slot: int, count: int) -> tuple[int, ...]:
        """The first ``count`` tokens that are proposed for a slot."""
        return tuple(self._tokens[slot, :count].tolist())

    def positions(self, slots: list[int], counts: Sequence[int]) -> Positions:
        """The positions of a step in which ``counts[i]`` drafts of ``slots[i]`` run."""
        drafts = [self.of(slot, count) for slot, count in zip(slots, counts, strict=True)]
        sizes = np.asarray(counts) + 1
        ends = np.cumsum(sizes)
        row = np.repeat(np.arange(len(slots)), sizes)
        arrays = np.asarray(slots)[row], np.arange(len(row)) - (ends - sizes)[row], ends - sizes
        slot, offset, starts = (torch.from_numpy(array).to(self._device, non_blocking=True) for array in arrays)
        width = max(counts)
        draft = torch.from_numpy(self._tokens[:, :width].copy()).to(self._device, non_blocking=True)
        return Positions(slots, slot, offset, draft, starts, drafts)


def with_copies(
    logits: torch.Tensor, drafts: np.ndarray | None, parents: Sequence[int]
) -> tuple[torch.Tensor, np.ndarray | None]:
    """Branches begin that share the logits of others, which have no drafts yet.

    Args:
        logits: float32 ``[n, vocab_size_padded]``, by position.
        drafts: int64, how many drafts each branch so far has; None: none.
        parents: for each branch that begins, the place of the other.

    Returns:
        The same, with the branches that begin behind them.
    """
    places = np.asarray(parents)
    if drafts is not None:
        places = (np.cumsum(drafts + 1) - drafts - 1)[places]
        drafts = np.concatenate([drafts, np.zeros(len(parents), np.int64)])
    return torch.cat([logits, logits[torch.from_numpy(places).to(logits.device)]]), drafts
