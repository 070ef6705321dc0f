"""Beam search with the classic runtime's semantics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from trtllm_core.decoding.beams import Beams, Decision, Search
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import BranchView


class BeamSearch(Beams):
    """Beam search as the classic runtime does it, for K beams (``num_beams``, or step by step ``beam_width_array``).

    1. Of each beam the 2K likeliest tokens are candidates, with the beam's score plus their log-probability plus
       ``beam_search_diversity_rate`` times the number of the beam. The best 2K of all beams are taken in order.
    2. One that ends with a rank below K is finished, with its score over its length to the power of
       ``length_penalty``. The others become the next beams, until there are K. One that only runs into
       ``max_new_tokens`` counts as another.
    3. With K finished sequences the request is over for ``early_stopping`` 1; for 0 once the best beam could not get
       into them at its present length; otherwise once it could not at the length that suits it best (its longest
       where ``length_penalty`` is above 0).
    4. A request that runs into ``max_new_tokens`` before ranks its beams among the finished ones.

    It returns K sequences, or ``num_return_sequences`` where that is set.
    """

    examples: ClassVar[Sequence[Example]] = (
        Example(sampling={"num_beams": 3}),
        Example(sampling={"num_beams": 2, "length_penalty": 0.5}),
        Example(sampling={"num_beams": 4, "early_stopping": 0}),
    )

    def widths(self, view: BranchView) -> tuple[int, ...]:
        sampling = view.sampling
        if not sampling.beam_width_array:
            return (sampling.num_beams,)
        widths = sampling.beam_width_array
        if not 1 <= min(widths) <= max(widths) <= 64:
            raise ConfigError(f"beam_width_array={widths}: each width is 1 to 64")
        if "num_beams" in sampling.model_fields_set and sampling.num_beams != max(widths):
            raise ConfigError(f"num_beams={sampling.num_beams} is not the largest of beam_width_array={widths}")
        return widths

    def returns(self, view: BranchView, most: int) -> int:
        if "num_return_sequences" in view.sampling.model_fields_set:
            return super().returns(view, most)
        return self.widths(view)[-1]

    def bonus(self, search: Search) -> float:
        return search.sampling.beam_search_diversity_rate

    def decide(self, search: Search, scores: Sequence[float], stops: Sequence[Stop | None]) -> Decision:
        width, length = search.width, search.length + 1
        going: list[int] = []
        finished: list[tuple[int, float]] = []
        for number, stop in enumerate(stops):
            if stop is None or stop.reason == "length":
                going += [number] if len(going) < width else []
            elif number < width:
                finished.append((number, self.rank(search, scores[number], length)))
        if self._done(search, [score for _, score in finished], [scores[number] for number in going]):
            return Decision((), finished)
        late = [number for number in going if stops[number] is not None]
        finished += [(number, self.rank(search, scores[number], length)) for number in late]
        return Decision(list(enumerate(number for number in going if stops[number] is None)), finished)

    def _done(self, search: Search, finished: Sequence[float], going: Sequence[float]) -> bool:
        """Whether enough sequences are finished. ``going`` are the scores of the beams, best first."""
        best = sorted([*search.finished, *finished], reverse=True)[: search.width]
        if len(best) < search.width:
            return False
        mode, length = search.sampling.early_stopping, search.length + 1
        if mode == 1 or not going:
            return True
        if mode != 0 and search.sampling.length_penalty > 0:
            length = search.most
        return best[-1] >= self.rank(search, going[0], length)
