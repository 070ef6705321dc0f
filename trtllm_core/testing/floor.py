"""A decoding floor without an engine: slots with a text, and the batches that plugins are shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.decoding.random import slot_key
from trtllm_core.decoding.slots import Slots
from trtllm_core.plugin import BranchView, CommitBatch, LogitsBatch

UNDEFINED = 10**9
"""What stands where a plugin must not look: not even a token."""


class Floor:
    """The core's own slots, filled by hand instead of by a loop. Its clock stands still, unless somebody moves ``now``.

    Args:
        slots: how many.
        vocab_size: tokens; ``padding`` more columns follow in the logits.
        max_seq_len: prompt and generated tokens of a slot.
        device: where the tensors are.
        text: detokenises; None is a floor without a tokenizer.
    """

    def __init__(
        self,
        slots: int = 8,
        vocab_size: int = 40,
        padding: int = 4,
        max_seq_len: int = 96,
        device: torch.device | str = "cpu",
        text: TokenBytes | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.now = 0.0
        """What the clock says, in seconds."""
        self.slots = Slots(slots, max_seq_len, vocab_size, vocab_size + padding, self.device, text, lambda: self.now)
        self.context = self.slots.context
        # Undefined behind the texts, so that a plugin which reads there is found out.
        self.slots.tokens[:] = vocab_size - 1
        if self.device.type != "cpu":
            self.context.tokens.fill_(vocab_size - 1)

    def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        params: Any = None,
        end_ids: tuple[int, ...] = (),
        seed: int = 0,
        branch: int = 0,
    ) -> BranchView:
        """A branch starts in a slot; the view is what its plugins are shown."""
        self.slots.begin(slot, prompt, slot_key(seed, branch), self.slots.context.max_seq_len)
        return BranchView(str(seed), branch, slot, tuple(prompt), sampling, end_ids, seed, params)

    def history(self, slot: int) -> list[int]:
        """Prompt and committed tokens of a slot."""
        return self.slots.history(slot)

    def positions(
        self,
        slots: Sequence[int],
        active: Sequence[bool] | None = None,
        offsets: Sequence[int] | None = None,
        drafts: Mapping[int, Sequence[int]] | None = None,
    ) -> LogitsBatch:
        """The positions of a step: all active and without drafts, unless it is said otherwise."""
        n, draft = len(slots), None
        if drafts is not None:
            width = max(map(len, drafts.values()))
            table = np.full((self.context.slots, width), UNDEFINED, np.int32)
            for slot, tokens in drafts.items():
                table[slot, : len(tokens)] = tokens
            draft = torch.from_numpy(table).to(self.device)
        return LogitsBatch(
            self.context,
            self._ints(slots),
            self._ints(offsets if offsets is not None else [0] * n),
            torch.tensor(active if active is not None else [True] * n, device=self.device),
            draft,
        )

    def chosen(
        self,
        new: Mapping[int, Sequence[int]],
        active: Sequence[bool] | None = None,
        scores: torch.Tensor | None = None,
    ) -> CommitBatch:
        """Tokens that a step chose, ``new[slot]`` of each slot, in the order of the mapping.

        ``scores`` are the logits that they were chosen from, float32 ``[positions, vocab_size_padded]``: a token's row
        is its place in the text, modulo ``positions``.
        """
        width = max(1, *map(len, new.values()))
        tokens = torch.full((len(new), width), UNDEFINED)
        for row, given in zip(tokens, new.values(), strict=True):
            row[: len(given)] = torch.tensor(list(given), dtype=torch.int64)
        flags = torch.tensor(active if active is not None else [True] * len(new), device=self.device)
        counts = self._ints([len(given) for given in new.values()])
        slot = self._ints(list(new))
        if scores is None:
            return CommitBatch(self.context, slot, tokens.to(self.device), counts, flags)
        source = self.context.lengths[slot].unsqueeze(1) + torch.arange(width, device=self.device)
        return CommitBatch(self.context, slot, tokens.to(self.device), counts, flags, scores, source % len(scores))

    def commit(self, batch: CommitBatch) -> None:
        """The tokens become history; the plugins' ``commit`` comes after it."""
        self.slots.commit(batch.slot, batch.tokens, batch.counts)
        rows = zip(batch.tokens.tolist(), batch.counts.tolist(), strict=True)
        self.slots.record(batch.slot.tolist(), [row[:count] for row, count in rows])

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Slots ``dst`` become copies of ``src``, all at the same time; their random keys stay."""
        self.slots.fork(src, dst)

    def rewind(self, slot: int, n: int) -> None:
        """The last ``n`` tokens of a slot go back. They stay readable behind its text, as in the loop."""
        self.slots.rewind(slot, n)

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)
