"""How plain-Python processors and criteria take part: adapters that keep a state for each slot.

The device interface gives tensors; the host kind needs lists. Where the caller has them as lists anyway, as the step
loop does, it uses the ``_rows`` methods; the tensor methods copy to the host first, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.plugin.logits import DeviceLogitsProcessor, HostLogitsProcessor
from trtllm_core.plugin.stopping import HostStoppingCriterion, Stop

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch

History = Callable[[int], Sequence[int]]
"""Slot → prompt and committed tokens, on the host."""

P = TypeVar("P", bound=HostLogitsProcessor | HostStoppingCriterion)


@dataclass(frozen=True, slots=True)
class HostRow:
    """One position of a step."""

    slot: int
    draft: tuple[int, ...] = ()
    """The drafts before the position, in a verify step."""


class HostAdapter(SlotPlugin, Generic[P]):
    """The lifecycle of a host plugin: one state a slot, of branches that asked for the plugin.

    Args:
        plugin: the plain-Python object.
        history: a slot's tokens.
    """

    def __init__(self, plugin: P, history: History) -> None:
        self.plugin = plugin
        self.history = history
        self._states: dict[int, Any] = {}

    def setup(self, context: DecodingContext) -> None:
        self.plugin.setup(context)

    def begin(self, slot: int, view: BranchView) -> None:
        self._states[slot] = self.plugin.start(view)

    def commit(self, batch: CommitBatch) -> None:
        slots, tokens, counts = batch.slot.tolist(), batch.tokens.tolist(), batch.counts.tolist()
        self.commit_rows(slots, [row[:count] for row, count in zip(tokens, counts, strict=True)])

    def commit_rows(self, slots: Sequence[int], new: Sequence[Sequence[int]]) -> None:
        """As ``commit``: ``new[i]`` was committed in ``slots[i]``. Slots that did not ask are passed over."""
        for slot, tokens in zip(slots, new, strict=True):
            if tokens and slot in self._states:
                self._states[slot] = self.plugin.accept(self._states[slot], tokens)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.fork_rows(src.tolist(), dst.tolist())

    def fork_rows(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """As ``fork``."""
        pairs = [(d, s) for s, d in zip(src, dst, strict=True) if s in self._states]
        copies = {d: self.plugin.copy(self._states[s]) for d, s in pairs}  # all of them, before any is put in place
        self._states.update(copies)

    def rewind(self, slot: int, n: int) -> None:
        self._states[slot] = self.plugin.take_back(self._states[slot], n)

    def end(self, slot: int) -> None:
        self._states.pop(slot, None)
        self.plugin.end(slot)


class HostProcessorAdapter(HostAdapter[HostLogitsProcessor], DeviceLogitsProcessor):
    """Runs a ``HostLogitsProcessor`` as a ``DeviceLogitsProcessor``.

    Call ``prepare`` with a step's positions while the forward pass runs, to fill the masks beside it; ``apply`` then
    only applies them. Without it ``apply`` does both.
    """

    def __init__(self, plugin: HostLogitsProcessor, history: History) -> None:
        super().__init__(plugin, history)
        # An adapter stands where its plugin would.
        self.phase, self.before, self.after = plugin.phase, plugin.before, plugin.after  # type: ignore[misc]
        self.capabilities = plugin.capabilities  # type: ignore[misc]
        kind = type(plugin)
        self.masks = kind.mask is not HostLogitsProcessor.mask
        """Whether it has the mask-only form."""
        self.processes = kind.process is not HostLogitsProcessor.process
        """Whether it must see the logits."""
        self._prepared: tuple[list[HostRow | None], torch.Tensor | None] | None = None

    def setup(self, context: DecodingContext) -> None:
        super().setup(context)
        self._device = context.device
        self._words = -(-context.vocab_size_padded // 32)
        self._bits = torch.arange(32, dtype=torch.int32, device=context.device)

    def companions(self, view: BranchView) -> Sequence[Sequence[int]]:
        return self.plugin.companions(view)

    def forced(self, slot: int) -> Sequence[int]:
        """Tokens that must come next in a slot, if they are known."""
        return self.plugin.forced(self._states[slot]) if slot in self._states else ()

    def prepare(self, rows: Sequence[HostRow | None]) -> None:
        """Fill the masks of the next ``apply``. ``rows`` are its positions; None where one is not active."""
        rows = [row if row is not None and row.slot in self._states else None for row in rows]
        words = np.full((len(rows), self._words), -1, np.int32)
        masked = False
        if self.masks:
            for row, mask in zip(rows, words, strict=True):
                if row is not None and not self.plugin.mask(*self._at(row), mask):
                    mask.fill(-1)
                elif row is not None:
                    masked = True
        device_words = torch.from_numpy(words).to(self._device, non_blocking=True) if masked else None
        self._prepared = rows, device_words

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        if self._prepared is None:
            self.prepare(_host_rows(batch))
        assert self._prepared is not None
        (rows, words), self._prepared = self._prepared, None
        if words is not None:
            allowed = ((words.unsqueeze(2) >> self._bits) & 1).view(len(rows), -1)
            logits.masked_fill_(allowed[:, : logits.shape[1]] == 0, -torch.inf)
        if self.processes:
            for row, row_logits in zip(rows, logits, strict=True):
                if row is not None:
                    self.plugin.process(*self._at(row), row_logits)

    def _at(self, row: HostRow) -> tuple[Any, Sequence[int]]:
        """State and tokens at a position: those of the slot, and what its drafts would make of them."""
        state, tokens = self._states[row.slot], self.history(row.slot)
        if not row.draft:
            return state, tokens
        return self.plugin.accept(self.plugin.copy(state), row.draft), [*tokens, *row.draft]


class HostCriterionAdapter(HostAdapter[HostStoppingCriterion]):
    """Runs a ``HostStoppingCriterion`` for the rows of a step."""

    def __init__(self, plugin: HostStoppingCriterion, history: History) -> None:
        super().__init__(plugin, history)
        self.scope, self.capabilities = plugin.scope, plugin.capabilities

    def check_rows(self, slots: Sequence[int], new: Sequence[Sequence[int]]) -> list[Stop | None]:
        """What the criterion says of ``new[i]``, chosen in ``slots[i]`` and not committed yet. Changes nothing."""
        return [
            self.plugin.check(self._states[slot], self.history(slot), tokens)
            if tokens and slot in self._states
            else None
            for slot, tokens in zip(slots, new, strict=True)
        ]

    def pending_text(self, slot: int) -> int:
        """Bytes at the end of a slot's text that a stream must hold back."""
        return self.plugin.pending_text(self._states[slot]) if slot in self._states else 0


def _host_rows(batch: LogitsBatch) -> list[HostRow | None]:
    """A step's positions as the host sees them. Waits for the device."""
    slots, offsets, active = batch.slot.tolist(), batch.offset.tolist(), batch.active.tolist()
    drafts = None if batch.draft is None else batch.draft[batch.slot].tolist()
    return [
        HostRow(slot, tuple(drafts[i][: offsets[i]]) if drafts else ()) if active[i] else None
        for i, slot in enumerate(slots)
    ]
