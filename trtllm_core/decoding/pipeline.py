"""The logits pipeline: raw logits in, processed logits out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from trtllm_core.decoding.host import HostProcessorAdapter, HostRow
from trtllm_core.decoding.order import ordered
from trtllm_core.decoding.stages import Stage, Stages
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import DecodingContext, DeviceLogitsProcessor, HostLogitsProcessor, LogitsBatch, LogitsProcessor


class LogitsPipeline(Stages[DeviceLogitsProcessor]):
    """Runs the processors that this step's slots asked for, in order, on a copy of the raw logits.

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

        super().__init__(context, wrap, ordered)
        self._work = torch.empty(positions, context.vocab_size_padded, device=context.device)
        self._debug = debug
        self._broken: list[Stage[DeviceLogitsProcessor]] = []  # failed in ``prepare``: ``apply`` passes them over

    def prepare(self, slots: Sequence[int]) -> None:
        """Let the host processors fill their masks for the positions of the next ``apply``, while the engine runs."""
        for stage in self.live:
            if isinstance(stage.plugin, HostProcessorAdapter):
                rows = [HostRow(slot) if slot in stage.members else None for slot in slots]
                try:
                    stage.call(stage.plugin.prepare, rows)
                    self._fail_branches(stage)
                except PluginError as error:
                    self._fail(stage, error)
                    self._broken.append(stage)

    def apply(
        self,
        raw: torch.Tensor,
        slot: torch.Tensor,
        offset: torch.Tensor,
        draft: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Process ``raw`` (float32 ``[n, vocab_size_padded]``, left as it is); returns the result, same shape.

        Where nobody processes anything, that is ``raw`` itself.
        """
        stages = [stage for stage in self.live if stage not in self._broken]
        self._broken.clear()
        while stages:
            logits = self._work[: raw.shape[0]].copy_(raw)
            for stage in stages:
                batch = LogitsBatch(self.context, slot, offset, stage.flags[slot], draft)
                try:
                    logits = self._checked(stage, logits, stage.call(stage.plugin.apply, logits, batch))
                    self._fail_branches(stage)
                except PluginError as error:
                    self._fail(stage, error)
                    stages.remove(stage)
                    break
            else:
                return logits
        return raw

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


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
