"""Deciding which rows end: the device criteria in one pass, then the host criteria of the rows that have some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trtllm_core.decoding.host import HostCriterionAdapter
from trtllm_core.decoding.stages import Stage, Stages
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import (
    CommitBatch,
    DecodingContext,
    DeviceStoppingCriterion,
    HostStoppingCriterion,
    Selection,
    Stop,
    StoppingCriterion,
)

Criterion = DeviceStoppingCriterion | HostCriterionAdapter


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the criteria said about a step. Lists are on the host, one entry a row."""

    tokens: list[list[int]]
    """What was chosen, before any cut."""
    stops: list[Stop | None]
    wrong: dict[int, str]
    """Slots whose decoder chose what is no token, and what that was. They have no tokens here."""


class StoppingRules(Stages[Criterion]):
    """The stopping criteria of a session. The earliest stop of a row wins. At the same token ``length``
    gives way to any other reason, and then the first registered wins."""

    def __init__(self, context: DecodingContext, history: Callable[[int], Sequence[int]]) -> None:
        def wrap(criterion: StoppingCriterion) -> Criterion:
            if isinstance(criterion, HostStoppingCriterion):
                return HostCriterionAdapter(criterion, history)
            assert isinstance(criterion, DeviceStoppingCriterion)
            return criterion

        super().__init__(context, wrap)

    def check(self, selection: Selection, slot: torch.Tensor, slots: Sequence[int]) -> Verdict:
        """Ask all criteria. Pure; this is where the step's tokens come to the host, in one transfer."""
        width = selection.tokens.shape[1]
        device = [s for s in self.live if isinstance(s.plugin, DeviceStoppingCriterion)]
        columns = [selection.tokens, selection.counts.unsqueeze(1)]
        for stage in device:
            columns.append(self._ask(stage, selection, slot).unsqueeze(1))
        table = torch.cat(columns, 1).tolist()
        tokens, wrong = self._known(slots, [(row[:width], row[width]) for row in table])
        stops = [self._earliest(device, row[width + 1 :], len(new)) for row, new in zip(table, tokens, strict=True)]
        for stage in self.live:
            if isinstance(stage.plugin, HostCriterionAdapter):
                self._ask_host(stage, stage.plugin, slots, tokens, stops)
        return Verdict(tokens, stops, wrong)

    def _known(
        self, slots: Sequence[int], chosen: Sequence[tuple[list[int], int]]
    ) -> tuple[list[list[int]], dict[int, str]]:
        """The tokens of each row, before any host criterion sees them, and what is wrong with the others."""
        vocab, tokens, wrong = self.context.vocab_size, [], {}
        for slot, (row, count) in zip(slots, chosen, strict=True):
            new = row[:count] if 0 < count <= len(row) else []
            if not new:
                wrong[slot] = f"chose {count} of {len(row)} tokens"
            elif min(new) < 0 or max(new) >= vocab:
                bad = next(token for token in new if not 0 <= token < vocab)
                wrong[slot], new = f"chose token {bad}, outside the vocabulary of {vocab}", []
            tokens.append(new)
        return tokens, wrong

    def pending(self, slot: int) -> int:
        """Bytes at the end of a slot's text that a stream must hold back."""
        most = 0
        for stage in self.live:
            if isinstance(stage.plugin, HostCriterionAdapter) and slot in stage.members:
                try:
                    held = stage.call(stage.plugin.pending_text, slot)
                    if not isinstance(held, int):
                        raise PluginContractError(f"criterion {stage.name!r} returned {held!r} from pending_text")
                    most = max(most, held)
                except PluginError as error:
                    self._fail(stage, error)
        return most

    def _ask(self, stage: Stage[Criterion], selection: Selection, slot: torch.Tensor) -> torch.Tensor:
        assert isinstance(stage.plugin, DeviceStoppingCriterion)
        active = stage.flags[slot]
        batch = CommitBatch(self.context, slot, selection.tokens, selection.counts, active)
        try:
            at = stage.call(stage.plugin.check, batch)
            if not isinstance(at, torch.Tensor) or (at.shape, at.dtype, at.device) != (
                slot.shape,
                torch.int64,
                slot.device,
            ):
                raise PluginContractError(f"criterion {stage.name!r} returned {at!r} from check, not int64 [n]")
        except PluginError as error:
            self._fail(stage, error)
            return torch.full_like(slot, -1)
        return torch.where(active, at, -1)

    @staticmethod
    def _earliest(stages: Sequence[Stage[Criterion]], answers: Sequence[int], count: int) -> Stop | None:
        best: Stop | None = None
        for stage, at in zip(stages, answers, strict=True):
            plugin = stage.plugin
            assert isinstance(plugin, DeviceStoppingCriterion)
            stop = Stop(plugin.reason, at, plugin.counted) if 0 <= at < count else None
            if _earlier(stop, best):
                best = stop
        return best

    def _ask_host(
        self,
        stage: Stage[Criterion],
        adapter: HostCriterionAdapter,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        stops: list[Stop | None],
    ) -> None:
        rows = [i for i, slot in enumerate(slots) if slot in stage.members]
        try:
            answers = stage.call(adapter.check_rows, [slots[i] for i in rows], [tokens[i] for i in rows])
        except PluginError as error:
            self._fail(stage, error)
            return
        for i, stop in zip(rows, answers, strict=True):
            if stop is not None and not isinstance(stop, Stop):
                error = PluginContractError(
                    f"criterion {stage.name!r} returned a {type(stop).__name__} from check, not a Stop or None"
                )
                self.failures.setdefault(slots[i], error)
            elif _earlier(stop, stops[i]):
                stops[i] = stop


def _earlier(stop: Stop | None, other: Stop | None) -> bool:
    if stop is None or other is None:
        return stop is not None
    return (stop.at, stop.reason == "length") < (other.at, other.reason == "length")
