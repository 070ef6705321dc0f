"""What the core does for decoders: a request's own processors and sampler, where the decoder asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch

from trtllm_core.decoding.companions import Companions
from trtllm_core.decoding.looking import Looks
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.stages import Stages
from trtllm_core.decoding.verifying import checked_tokens
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import DecodingContext, LogitsBatch, Sampler


class Samplers(Stages[Sampler]):
    """The samplers of requests whose decoder is none itself, but asks for one."""

    def __init__(self, context: DecodingContext) -> None:
        super().__init__(context, lambda plugin: cast("Sampler", plugin))

    def merged(
        self,
        call: Callable[[Sampler], Callable[[torch.Tensor, LogitsBatch], torch.Tensor]],
        nothing: torch.Tensor,
        logits: torch.Tensor,
        batch: LogitsBatch,
    ) -> torch.Tensor:
        """What each row's own sampler answers; ``nothing`` for rows that have none, or whose sampler failed."""
        for stage in self.live:
            active = stage.flags[batch.slot]
            try:
                found = stage.call(call(stage.plugin), logits.clone(), replace(batch, active=active))
                if nothing.dim() == 1:
                    found = checked_tokens(found, batch)
                elif not isinstance(found, torch.Tensor) or found.shape != nothing.shape:
                    raise PluginContractError(f"sampler {stage.name!r} returned {found!r} from distribution")
            except PluginError as error:
                self.fail(stage, error)
                continue
            nothing = torch.where(active.unsqueeze(1) if nothing.dim() > 1 else active, found, nothing)
        return nothing


class Host:
    """See ``DecoderHost``."""

    def __init__(self, pipeline: LogitsPipeline, samplers: Samplers, companions: Companions) -> None:
        self._pipeline = pipeline
        self._samplers = samplers
        self._companions = companions
        self.looks: Looks
        """Set by the loop, which has the engine."""

    def look(
        self, source: Sequence[int | None], resting: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """See ``DecoderHost``, as what follows."""
        return self.looks.run(source, resting, tokens)

    def process(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        if self._companions and any(slot in self._companions.of for slot in batch.slot.tolist()):
            raise PluginContractError(
                "a decoder has logits processed that are no step's, for a request whose processor has companions: "
                "they have none for it"
            )
        return self._pipeline.apply(logits, batch.slot, batch.offset, batch.draft).logits.clone()

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return self._samplers.merged(lambda sampler: sampler.sample, torch.zeros_like(batch.slot), logits, batch)

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return self._samplers.merged(lambda sampler: sampler.distribution, torch.zeros_like(logits), logits, batch)
