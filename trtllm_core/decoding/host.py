"""How plain-Python processors and criteria take part: adapters that keep a state for each slot.

The device interface gives tensors; the host kind needs lists. Where the caller has them as lists anyway, as the step
loop does, it uses the ``_rows`` methods; the tensor methods copy to the host first, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from trtllm_core.errors import BranchError
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
        self.failed: dict[int, BranchError] = {}
        """Slots about which the plugin raised ``BranchError``, until ``take_failed``."""
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
                try:
                    self._states[slot] = self.plugin.accept(self._states[slot], tokens)
                except BranchError as error:
                    self.failed[slot] = error

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
        self.failed.pop(slot, None)
        self.plugin.end(slot)

    def take_failed(self) -> dict[int, BranchError]:
        """What the plugin raised about single branches since the last call."""
        failed, self.failed = self.failed, {}
        return failed


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
        self.contrasts = kind.process_beside is not HostLogitsProcessor.process_beside
        """Whether it must see those of its companions, too."""
        self.forces = kind.forced is not HostLogitsProcessor.forced
        """Whether it may know tokens in advance."""
        self._prepared: tuple[list[HostRow | None], list[int]] | None = None  # positions, and which have a mask

    def setup(self, context: DecodingContext) -> None:
        super().setup(context)
        self._masks = MaskBuffer(context.vocab_size_padded, context.device)

    def forced(self, slot: int) -> Sequence[int]:
        """Tokens that must come next in a slot, if they are known."""
        return self.plugin.forced(self._states[slot]) if slot in self._states else ()

    def prepare(self, rows: Sequence[HostRow | None]) -> None:
        """Fill the masks of the next ``apply``. ``rows`` are its positions; None where one is not active."""
        rows = [row if row is not None and row.slot in self._states else None for row in rows]
        masked: list[int] = []
        if self.masks:
            masks = self._masks.cleared(len(rows))
            for i, slot, state, tokens in self._positions(rows):
                try:
                    if self.plugin.mask(state, tokens, masks[i]):
                        masked.append(i)
                except BranchError as error:
                    self.failed[slot] = error
        self._prepared = rows, masked

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        if self._prepared is None:
            self.prepare(_host_rows(batch))
        assert self._prepared is not None
        (rows, masked), self._prepared = self._prepared, None
        if masked:
            self._masks.apply(logits, masked)
        if self.contrasts:
            rows_of = None if batch.companions is None else batch.companions.tolist()
            for i, slot, state, tokens in self._positions(rows):
                beside = logits[:0]
                if rows_of is not None and batch.companion_logits is not None:
                    beside = batch.companion_logits[[row for row in rows_of[i] if row >= 0]]
                try:
                    self.plugin.process_beside(state, tokens, logits[i], beside)
                except BranchError as error:
                    self.failed[slot] = error
        elif self.processes:
            for i, slot, state, tokens in self._positions(rows):
                try:
                    self.plugin.process(state, tokens, logits[i])
                except BranchError as error:
                    self.failed[slot] = error

    def _positions(self, rows: Sequence[HostRow | None]) -> Iterator[tuple[int, int, Any, Sequence[int]]]:
        """Index, slot, state and tokens of each active position: those of the slot, and what its drafts make of them.

        A slot's state is copied once for all its drafts. What follows a draft that the plugin refuses can never be
        chosen, and is passed over.
        """
        state: Any = None
        slot, draft, refused = -1, tuple[int, ...](), False  # whose copy it is, the drafts that it has seen
        for i, row in enumerate(rows):
            if row is None:
                continue
            if not row.draft:
                yield i, row.slot, self._states[row.slot], self.history(row.slot)
                continue
            if row.slot != slot or row.draft[: len(draft)] != draft:
                slot, draft, refused = row.slot, (), False
                state = self.plugin.copy(self._states[slot])
            if not refused:
                try:
                    state = self.plugin.accept(state, row.draft[len(draft) :])
                except BranchError:
                    refused = True
            draft = row.draft
            if not refused:
                yield i, slot, state, [*self.history(slot), *draft]


class MaskBuffer:
    """Packed masks of a step's positions, filled on the host and applied on the device.

    Args:
        width: of the logits.
        device: of the logits.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._device = device
        self._words = np.empty((0, -(-width // 32)), np.int32)
        # For each byte of a mask the largest values that the logits of its eight tokens may have.
        self._bounds = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.inf, -np.inf).astype(np.float32)
        self._row = np.empty((self._words.shape[1] * 4, 8), np.float32)

    def cleared(self, n: int) -> np.ndarray:
        """int32 ``[n, ceil(width / 32)]``, all ones: nothing is forbidden. It is the same memory each time."""
        if n > len(self._words):
            self._words = np.empty((n, self._words.shape[1]), np.int32)
        words = self._words[:n]
        words.fill(-1)
        return words

    def apply(self, logits: torch.Tensor, masked: Sequence[int]) -> None:
        """Set the logits (float32 ``[n, width]``) of forbidden tokens to -inf. Rows not in ``masked`` have no mask."""
        if self._device.type == "cpu":
            self._apply_here(logits, masked)
            return
        rows = torch.tensor(masked).to(self._device, non_blocking=True)
        closed = np.invert(self._words[list(masked)]).view(np.uint8)
        forbidden = unpacked(torch.from_numpy(closed).to(self._device, non_blocking=True))[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)

    def _apply_here(self, logits: torch.Tensor, masked: Sequence[int]) -> None:
        """A table and a minimum, row by row: unlike filling by a mask, it takes as long whatever the mask is."""
        bounds = torch.from_numpy(self._row).view(-1)[: logits.shape[1]]
        for i in masked:
            np.take(self._bounds, self._words[i].view(np.uint8), axis=0, out=self._row, mode="clip")
            torch.minimum(logits[i], bounds, out=logits[i])


def unpacked(octets: torch.Tensor) -> torch.Tensor:
    """The bits of bytes, the lowest first: bool ``[n, 8 * m]`` for uint8 ``[n, m]``, on the same device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return ((octets.unsqueeze(2) >> shifts) & 1).flatten(1).bool()


class HostCriterionAdapter(HostAdapter[HostStoppingCriterion]):
    """Runs a ``HostStoppingCriterion`` for the rows of a step."""

    def __init__(self, plugin: HostStoppingCriterion, history: History) -> None:
        super().__init__(plugin, history)
        self.scope, self.capabilities = plugin.scope, plugin.capabilities

    def check_rows(self, slots: Sequence[int], new: Sequence[Sequence[int]]) -> list[Stop | None]:
        """What the criterion says of ``new[i]``, chosen in ``slots[i]`` and not committed yet. Changes nothing."""
        return [self._check(slot, tokens) for slot, tokens in zip(slots, new, strict=True)]

    def _check(self, slot: int, new: Sequence[int]) -> Stop | None:
        if not new or slot not in self._states:
            return None
        try:
            return self.plugin.check(self._states[slot], self.history(slot), new)
        except BranchError as error:
            self.failed[slot] = error
            return None

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
