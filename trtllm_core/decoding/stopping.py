"""Deciding which rows end: the device criteria in one pass, then the host criteria of the rows that have some."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trtllm_core.decoding.fetching import Coming, HostCopy
from trtllm_core.decoding.host import HostCriterionAdapter
from trtllm_core.decoding.stages import Scores, Stage, Stages
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import (
    DecodingContext,
    DeviceStoppingCriterion,
    HostStoppingCriterion,
    Selection,
    Stop,
    StoppingCriterion,
)
from trtllm_core.plugin.decoder import NO_TOKEN

Criterion = DeviceStoppingCriterion | HostCriterionAdapter


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the criteria said about a step. Lists are on the host, one entry a row."""

    tokens: list[list[int]]
    """What was chosen, before any cut."""
    stops: list[Stop | None]
    ends_request: list[bool]
    """Whether a row's stop ends all branches of its request: a criterion of that scope stopped there, or before."""
    wrong: dict[int, str]
    """Slots whose decoder chose what is no token, and what that was. They have no tokens here."""
    scores: Scores | None = None
    """What the tokens were chosen from, for the commit; None where no plugin needs it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the device criteria say of a step, on the device."""

    width: int
    """Most tokens of a row, k."""
    stages: Sequence[Stage[Criterion]]
    """The m criteria that were asked."""
    table: torch.Tensor
    """int64 ``[n, k + 1 + m]``: a row's tokens, how many of them there are, and where each criterion stops it."""
    scores: Scores | None = None
    """What the tokens were chosen from; None where no plugin needs it."""


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
        self._history = history
        self._fetch = HostCopy(context.device)

    def ask(
        self,
        selection: Selection,
        slot: torch.Tensor,
        logits: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> Asked:
        """Ask the device criteria, and send the step's tokens to the host with their answers. Pure, and waits for
        nothing.

        ``logits`` and ``source`` are as in ``CommitBatch``; without ``logits`` no plugin at work needs any, and without
        ``source`` each row's tokens are from the row of the same number.
        """
        scores = None if logits is None else _scores(selection, logits, source)
        device = [s for s in self.live if isinstance(s.plugin, DeviceStoppingCriterion)]
        columns = [selection.tokens, selection.counts.unsqueeze(1)]
        for stage in device:
            columns.append(self._ask(stage, selection, slot, scores).unsqueeze(1))
        return Asked(selection.tokens.shape[1], device, torch.cat(columns, 1), scores)

    def send(self, asked: Asked) -> Coming:
        """Start the one transfer of a step that the host waits for."""
        return self._fetch.start(asked.table)

    def conclude(self, asked: Asked, table: np.ndarray, slots: Sequence[int]) -> Verdict:
        """Ask the host criteria, too, now that the tokens are here, and decide. Pure.

        ``table`` are rows of ``asked.table``, of ``slots``.
        """
        width, device = asked.width, asked.stages
        tokens, wrong = self._known(slots, table[:, :width], table[:, width])
        ends: defaultdict[int, _Ends] = defaultdict(_Ends)  # by row, of the few that end
        for row, column in np.argwhere(table[:, width + 1 :] >= 0).tolist():
            stage, at = device[column], int(table[row, width + 1 + column])
            if at < len(tokens[row]):
                plugin = stage.plugin
                assert isinstance(plugin, DeviceStoppingCriterion)
                ends[row].add(Stop(plugin.reason, at, plugin.counted), plugin.scope, stage)
        for stage in self.live:
            if isinstance(stage.plugin, HostCriterionAdapter):
                self._ask_host(stage, stage.plugin, slots, tokens, ends)
        stops: list[Stop | None] = [None] * len(slots)
        ends_request = [False] * len(slots)
        for row, end in ends.items():
            self._say_what_matched(slots[row], tokens[row], end)
            stops[row], ends_request[row] = end.stop, end.of_request
        return Verdict(tokens, stops, ends_request, wrong, asked.scores)

    def _say_what_matched(self, slot: int, new: Sequence[int], end: _Ends) -> None:
        """A device criterion says on the host what it found, once it has stopped a row."""
        if end.by is None:
            return
        assert end.stop is not None
        plugin = end.by.plugin
        if type(plugin).matched is DeviceStoppingCriterion.matched:  # type: ignore[union-attr]
            return
        try:
            text = [*self._history(slot), *new[: end.stop.at + 1]]
            end.stop = replace(end.stop, matched=end.by.call(plugin.matched, slot, text))  # type: ignore[union-attr]
        except PluginError as error:
            self.fail(end.by, error)

    def _known(
        self, slots: Sequence[int], chosen: np.ndarray, counts: np.ndarray
    ) -> tuple[list[list[int]], dict[int, str]]:
        """The tokens of each row, before any host criterion sees them, and what is wrong with the others.

        ``chosen`` is int64 ``[n, k]``, of each row the first ``counts``.
        """
        vocab, width = self.context.vocab_size, chosen.shape[1]
        if width == 1 and (counts == 1).all() and (chosen >= 0).all() and (chosen < vocab).all():
            return chosen.tolist(), {}
        tokens, wrong = [], {}
        for slot, row, count in zip(slots, chosen.tolist(), counts.tolist(), strict=True):
            new = row[:count] if 0 < count <= len(row) else []
            if not new:
                wrong[slot] = f"chose {count} of {len(row)} tokens"
            elif min(new) < 0 or max(new) >= vocab:
                bad = next(token for token in new if not 0 <= token < vocab)
                what = f"chose token {bad}, outside the vocabulary of {vocab}"
                wrong[slot], new = "found every token forbidden" if bad == NO_TOKEN else what, []
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
                    self.fail(stage, error)
        return most

    def _ask(
        self, stage: Stage[Criterion], selection: Selection, slot: torch.Tensor, scores: Scores | None
    ) -> torch.Tensor:
        assert isinstance(stage.plugin, DeviceStoppingCriterion)
        batch = stage.commit_batch(slot, selection.tokens, selection.counts, scores)
        try:
            at = stage.call(stage.plugin.check, batch)
            if not isinstance(at, torch.Tensor) or (at.shape, at.dtype, at.device) != (
                slot.shape,
                torch.int64,
                slot.device,
            ):
                raise PluginContractError(f"criterion {stage.name!r} returned {at!r} from check, not int64 [n]")
        except PluginError as error:
            self.fail(stage, error)
            return torch.full_like(slot, -1)
        return at if stage.total else torch.where(batch.active, at, -1)

    def _ask_host(
        self,
        stage: Stage[Criterion],
        adapter: HostCriterionAdapter,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        ends: Mapping[int, _Ends],
    ) -> None:
        rows = [i for i, slot in enumerate(slots) if slot in stage.members]
        try:
            answers = stage.call(adapter.check_rows, [slots[i] for i in rows], [tokens[i] for i in rows])
            self._fail_branches(stage)
        except PluginError as error:
            self.fail(stage, error)
            return
        for i, stop in zip(rows, answers, strict=True):
            if stop is not None and not isinstance(stop, Stop):
                error = PluginContractError(
                    f"criterion {stage.name!r} returned a {type(stop).__name__} from check, not a Stop or None"
                )
                self.failures.setdefault(slots[i], error)
            elif stop is not None:
                ends[i].add(stop, adapter.scope)


@dataclass(slots=True)
class _Ends:
    """What was said of one row's end so far."""

    stop: Stop | None = None
    """The one that counts."""
    by: Stage[Criterion] | None = None
    """Whose it is, where a device criterion's."""
    whole: int | None = None
    """The first token at which a criterion of scope ``request`` stopped."""

    def add(self, stop: Stop, scope: str, by: Stage[Criterion] | None = None) -> None:
        """A criterion stopped the row."""
        if self.stop is None or _order(stop) < _order(self.stop):
            self.stop, self.by = stop, by
        if scope == "request" and (self.whole is None or stop.at < self.whole):
            self.whole = stop.at

    @property
    def of_request(self) -> bool:
        """Whether the row's end is its request's. What comes after the end of the row never happened."""
        return self.stop is not None and self.whole is not None and self.whole <= self.stop.at


def _scores(selection: Selection, logits: torch.Tensor, source: torch.Tensor | None) -> Scores:
    if source is None:
        rows = torch.arange(len(selection.tokens), device=logits.device)
        source = rows.unsqueeze(1).expand_as(selection.tokens)
    return Scores(logits, source)


def _order(stop: Stop) -> tuple[int, bool]:
    return stop.at, stop.reason == "length"
