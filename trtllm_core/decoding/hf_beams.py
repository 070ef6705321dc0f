"""Beam search and beam sampling with the semantics of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from trtllm_core.decoding.beams import Beams, Decision, Search
from trtllm_core.decoding.random import draw_salt, uniform_rows
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import LogitsBatch


class HFBeamSearch(Beams):
    """Beam search as transformers does it, for K = ``num_beams``.

    Against the classic one: processors change log-probabilities, which are not normalised again; with n end tokens the
    best ``max(2, 1 + n)·K`` continuations are weighed; every stop with a rank below K finishes a sequence, that of the
    length limit too; beams that are still running when the request is over are not returned. ``early_stopping`` 1 is
    transformers' ``True``, 0 its ``False``, anything else its ``"never"``. It returns ``num_return_sequences``.
    """

    processors: ClassVar[tuple[str, ...]] = ("log_softmax",)
    examples: ClassVar[Sequence[Example]] = (
        Example(sampling={"num_beams": 3}),
        Example(sampling={"num_beams": 2, "early_stopping": 0}),
    )

    def weigh(self, search: Search) -> int:
        return max(2, 1 + len(search.end_ids)) * search.width

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def rank(self, search: Search, score: float, length: int) -> float:
        return float(score / length**search.sampling.length_penalty)

    def decide(self, search: Search, scores: Sequence[float], stops: Sequence[Stop | None]) -> Decision:
        width, length = search.width, search.length + 1
        finished = [
            (number, self.rank(search, scores[number], length))
            for number, stop in enumerate(stops[:width])
            if stop is not None
        ]
        going = [number for number, stop in enumerate(stops) if stop is None][:width]
        if self._done(search, [score for _, score in finished], [scores[number] for number in going]):
            return Decision((), finished)
        return Decision(list(enumerate(going)), finished)

    def _done(self, search: Search, finished: Sequence[float], going: Sequence[float]) -> bool:
        """Whether nothing better can come, or nobody waits for it. ``going`` are the beams' scores, best first."""
        best = sorted([*search.finished, *finished], reverse=True)[: search.width]
        if len(best) < search.width or not going:
            return not going
        mode, length = search.sampling.early_stopping, search.length + 1
        if mode == 1:
            return True
        if mode != 0 and search.sampling.length_penalty > 0:
            length = search.most
        return self.rank(search, going[0], length) <= best[-1]


class HFBeamSample(HFBeamSearch):
    """Beam sampling as transformers does it: the continuations that are weighed are drawn, without replacement, with
    the probabilities that the scores of a request's beams make together.

    Drawn by Gumbel's trick: of scores with independent Gumbel noise, the largest are such a draw.
    """

    SALT = draw_salt("hf_beam_sample")
    examples = (Example(sampling={"num_beams": 2}), Example(sampling={"num_beams": 3}))

    def noise(self, values: torch.Tensor, batch: LogitsBatch, at: torch.Tensor) -> torch.Tensor | None:
        context, slot = batch.context, batch.slot[at]
        u = uniform_rows(context.seeds[slot], context.lengths[slot], self.SALT, values.shape[1])
        return -torch.log(-torch.log(u.clamp(max=1 - 2.0**-24)))
