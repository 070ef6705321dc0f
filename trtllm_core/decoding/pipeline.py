"""The logits pipeline: raw logits in, processed logits out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from trtllm_core.decoding.companions import CompanionLogits
from trtllm_core.decoding.host import HostProcessorAdapter, HostRow
from trtllm_core.decoding.order import PRESETS, merged, ordered
from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.positions import Positions
from trtllm_core.decoding.stages import Stage, Stages
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    LogitsBatch,
    LogitsProcessor,
)


class Pass(NamedTuple):
    """One call of ``apply`` in a step."""

    stage: Stage[DeviceLogitsProcessor]
    flags: torch.Tensor
    """bool ``[slots]``: whose rows it is for."""
    unscored: bool
    """Whether it changes what the log-probabilities of some of these rows must not see."""


class Processed(NamedTuple):
    """What the pipeline makes of raw logits. Both are float32 ``[n, vocab_size_padded]``."""

    logits: torch.Tensor
    """To choose from. Where nobody processes anything, the raw logits themselves."""
    scores: torch.Tensor
    """To take log-probabilities from: the same tensor, unless somebody wants some and a preset leaves out a phase."""


class LogitsPipeline(Stages[DeviceLogitsProcessor]):
    """Runs the processors that this step's slots asked for, in order, on a copy of the raw logits.

    The order is that of the request's preset. Rows of several presets share a step: a processor that they put at
    different places runs at each of them, for the rows of that preset.

    When a processor fails, the step starts over from the raw logits without it: who did not ask for it never notices.
    """

    def __init__(
        self,
        context: DecodingContext,
        positions: int,
        history: Callable[[int], Sequence[int]],
        debug: bool = False,
    ) -> None:
        def wrap(processor: LogitsProcessor) -> DeviceLogitsProcessor:
            if isinstance(processor, HostLogitsProcessor):
                return HostProcessorAdapter(processor, history)
            assert isinstance(processor, DeviceLogitsProcessor)
            return processor

        super().__init__(context, wrap)
        self._work = torch.empty(positions, context.vocab_size_padded, device=context.device)
        self._wide = self._work  # of verify steps; apart, because graphs hold the address of the other
        self._debug = debug
        self._broken: list[Stage[DeviceLogitsProcessor]] = []  # failed in ``prepare``: ``apply`` passes them over
        self._presets: dict[int, str] = {}
        self._users: Counter[str] = Counter()  # slots of each preset
        self._made: tuple[object, ...] = ()  # what the passes were made of
        self._passes: list[Pass] = []
        self._all_scored: torch.Tensor | None = None  # bool [slots]: rows whose log-probabilities see every phase

    def begin(self, items: Iterable[PlanItem], view: BranchView) -> None:
        """See ``Stages``."""
        self._presets[view.slot] = view.sampling.preset
        self._users[view.sampling.preset] += 1
        super().begin(items, view)

    def end(self, slots: Sequence[int]) -> list[dict[str, float]]:
        """See ``Stages``."""
        for slot in slots:
            if (preset := self._presets.pop(slot, None)) is not None:
                self._users[preset] -= 1
        return super().end(slots)

    def beside(self, preset: str) -> list[PlanItem]:
        """The live processors of requests with this preset: what a new one is ordered with."""
        return [stage.item for stage in self._of_preset(preset)]

    def _of_preset(self, preset: str) -> list[Stage[DeviceLogitsProcessor]]:
        if self._users[preset] == len(self._presets):
            return self.live
        slots = {slot for slot, name in self._presets.items() if name == preset}
        return [stage for stage in self.live if not stage.members.isdisjoint(slots)]

    def _refresh(self) -> None:
        super()._refresh()
        presets = [name for name in PRESETS if self._users[name]]
        made = (*self.live, *presets)
        if made == self._made and len(presets) < 2:
            return  # who comes and goes among others of its kind changes nothing
        self._made = made
        stages = {stage.item.key: stage for stage in self.live}
        orders = {name: [item.key for item in ordered(self.beside(name), name)] for name in presets}
        self._passes = []
        for key, names in merged(orders):
            stage = stages[key]
            flags = stage.flags if len(names) == len(presets) else stage.flags & self._rows_of(names)
            unscored = any(stage.plugin.phase in PRESETS[name].unscored for name in names)
            self._passes.append(Pass(stage, flags, unscored))
        if any(each.flags is not each.stage.flags for each in self._passes):
            self.graph_key = None  # flags of presets are made anew when somebody comes or goes
        scored = {name for name in presets if not PRESETS[name].unscored}
        self._all_scored = self._rows_of(scored) if scored and len(scored) < len(presets) else None

    def _rows_of(self, presets: Collection[str]) -> torch.Tensor:
        """bool ``[slots]``: whose request has one of these presets."""
        here = [self._presets.get(slot) in presets for slot in range(self.context.slots)]
        return torch.tensor(here, device=self.context.device)

    def prepare(self, at: Positions) -> None:
        """Let the host processors fill their masks for the positions of the next ``apply``, while the engine runs.

        One that stands at several places, for rows of several presets, does so when its turns come.
        """
        for stage in self.live:
            once = sum(each.stage is stage for each in self._passes) == 1
            if isinstance(stage.plugin, HostProcessorAdapter) and once:
                rows = _host_rows(at, stage.members)
                try:
                    stage.call(stage.plugin.prepare, rows)
                    self._fail_branches(stage)
                except PluginError as error:
                    self.fail(stage, error)
                    self._broken.append(stage)

    def apply(
        self,
        raw: torch.Tensor,
        slot: torch.Tensor,
        offset: torch.Tensor,
        draft: torch.Tensor | None = None,
        scored: bool = False,
        companions: CompanionLogits | None = None,
        in_place: bool = False,
    ) -> Processed:
        """Process ``raw`` (float32 ``[n, vocab_size_padded]``, left as it is).

        Args:
            raw: what the engine computed.
            slot, offset, draft: the positions, as in ``LogitsBatch``.
            scored: whether somebody wants log-probabilities.
            companions: of the step; None: it has none.
            in_place: ``raw`` may be overwritten, and nobody can fail.
        """
        passes = [each for each in self._passes if each.stage not in self._broken]
        self._broken.clear()
        while passes:
            if len(raw) > len(self._wide):  # a verify step, with more positions than any before
                self._wide = torch.empty(1 << (len(raw) - 1).bit_length(), raw.shape[1], device=raw.device)
            work = self._work if len(raw) <= len(self._work) else self._wide
            logits, scores = raw if in_place else work[: len(raw)].copy_(raw), None
            for stage, flags, unscored in passes:
                if scored and unscored and scores is None:
                    scores = logits.clone()
                active = stage.active(slot) if flags is stage.flags else flags.index_select(0, slot)
                batch = LogitsBatch(self.context, slot, offset, active, draft)
                if companions is not None:
                    batch = companions.seen_by(stage.item.key, batch)
                try:
                    logits = self._checked(stage, logits, stage.call(stage.plugin.apply, logits, batch))
                    self._fail_branches(stage)
                except PluginError as error:
                    self.fail(stage, error)
                    passes = [each for each in passes if each.stage is not stage]
                    break
            else:
                if scores is None:
                    return Processed(logits, logits)
                if self._all_scored is not None:
                    scores = torch.where(self._all_scored[slot].unsqueeze(1), logits, scores)
                return Processed(logits, scores)
        return Processed(raw, raw)

    def _checked(
        self, stage: Stage[DeviceLogitsProcessor], given: torch.Tensor, result: torch.Tensor | None
    ) -> torch.Tensor:
        if result is None:
            result = given
        elif not isinstance(result, torch.Tensor):
            raise PluginContractError(
                f"plugin {stage.name!r} returned a {type(result).__name__} from apply, not a tensor or None"
            )
        elif (result.shape, result.dtype, result.device) != (given.shape, given.dtype, given.device):
            raise PluginContractError(
                f"plugin {stage.name!r} returned {_describe(result)} from apply, where {_describe(given)} was given"
            )
        if self._debug and math.isnan(float(result.sum())):
            raise PluginContractError(f"plugin {stage.name!r} left NaN in the logits")
        return result


def _host_rows(at: Positions, members: Collection[int]) -> list[HostRow | None]:
    """The positions of a step; None where their slot is none of ``members``."""
    if at.drafts is None:
        return [HostRow(slot) if slot in members else None for slot in at.slots]
    return [
        HostRow(slot, draft[:count]) if slot in members else None
        for slot, draft in zip(at.slots, at.drafts, strict=True)
        for count in range(len(draft) + 1)
    ]


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
