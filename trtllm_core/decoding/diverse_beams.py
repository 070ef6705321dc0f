"""Diverse (group) beam search with the semantics that transformers had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from trtllm_core.config import Config
from trtllm_core.decoding.beams import Decision, Search, best_of
from trtllm_core.decoding.hf_beams import HFBeamSearch
from trtllm_core.decoding.state import SlotTable
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.decoder import Candidates, Hypothesis, Survivors
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


class DiverseParams(Config):
    """Parameters of ``diverse_beam_search``."""

    groups: int = Field(ge=1, description="divides num_beams")
    penalty: float = Field(default=1.0, ge=0.0, description="of a token, per beam of an earlier group that took it")


@dataclass(slots=True)
class Group:
    """One group of a request's beams."""

    size: int
    finished: list[float] = field(default_factory=list)
    done: bool = False


class DiverseBeamSearch(HFBeamSearch):
    """The beams of a request in ``groups`` of equal size, each a search of its own, one after the other in each step.

    A token loses ``penalty`` for each beam of the earlier groups that took it in this step. Of a group's candidates
    those that end with a rank below its size are finished, the others become its beams. A group is over as a whole
    search is; when the request runs into its length limit, beams of the others are ranked too. The best
    ``num_return_sequences`` of all groups are returned.
    """

    Params = DiverseParams
    capabilities: ClassVar = HFBeamSearch.capabilities
    examples = (Example({"groups": 2, "penalty": 0.5}, {"num_beams": 4}),)

    _ends: SlotTable

    def setup(self, context: DecodingContext) -> None:
        super().setup(context)
        self._ends = SlotTable(context.slots, context.device, fill=-1)
        self._groups: dict[str, list[Group]] = {}
        self._params: dict[str, DiverseParams] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._origins: dict[str, list[int]] = {}
        self._closing: list[tuple[Group, list[float], bool]] = []

    def widths(self, view: BranchView) -> tuple[int, ...]:
        beams, groups = view.sampling.num_beams, view.params.groups
        if beams % groups:
            raise ConfigError(f"diverse_beam_search: {groups} groups cannot share num_beams={beams} evenly")
        return (beams,)

    def begin(self, slot: int, view: BranchView) -> None:
        super().begin(slot, view)
        self._ends.write(slot, view.end_ids)
        self._params[view.request_id] = view.params
        groups, size = view.params.groups, view.sampling.num_beams // view.params.groups
        self._groups.setdefault(view.request_id, [Group(size) for _ in range(groups)])

    def end(self, slot: int) -> None:
        name = self._of[slot][0].request_id
        super().end(slot)
        for notes in (self._groups, self._params, self._counts, self._origins):
            notes.pop(name, None)

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        self._closing = []
        return super().survive(candidates, stops)

    def commit(self, batch: CommitBatch) -> None:
        super().commit(batch)
        for group, finished, done in self._closing:
            group.finished += finished
            group.done = done
        self._closing = []

    def weigh(self, search: Search) -> int:
        return super().weigh(search) // len(self._groups[search.request_id])

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Candidates:
        """One group after the other, each for all requests at once."""
        at = batch.active.nonzero().squeeze(1)
        slot, device = batch.slot[at], logits.device
        beams = [self._of[each] for each in slot.tolist()]
        searches = list({id(search): search for search, _ in beams}.values())
        number = {search.request_id: i for i, search in enumerate(searches)}
        values, scores = logits[at], self._scores[slot]
        request = torch.tensor([number[search.request_id] for search, _ in beams], device=device)
        limit = torch.tensor([self.weigh(search) for search in searches], device=device)
        sizes = [self._groups[name][0].size for name in number]
        size = torch.tensor(sizes, device=device).unsqueeze(1)
        penalty = torch.tensor([self._params[name].penalty for name in number], device=device).unsqueeze(1)
        ends = torch.stack([self._ends.rows[search.slots[0]] for search in searches])
        taken = values.new_zeros(len(searches), values.shape[1])
        parts: dict[int, tuple[torch.Tensor, ...]] = {}
        for group in range(max(len(self._groups[name]) for name in number)):
            place = torch.tensor(self._rows(searches, beams, group), device=device)
            if not place.numel():
                continue
            row, tokens, totals, gains, kept = best_of(
                values - (penalty * taken)[request], scores, place, limit, int(limit.max())
            )
            parts[group] = slot[row], tokens, totals, gains, kept
            going = kept & (tokens.unsqueeze(2) != ends.unsqueeze(1)).all(dim=2)
            going &= going.cumsum(dim=1) <= size
            taken.scatter_add_(1, tokens, going.to(taken.dtype))
        return self._in_order(searches, parts)

    def finalize(self, request_id: str, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Of each group as many as it has beams, and those by score."""
        groups, origins = self._groups[request_id], self._origins.get(request_id, [])
        left = [group.size for group in groups]
        ranked = sorted(enumerate(hypotheses), key=lambda one: -one[1].score)
        best = []
        for number, one in ranked:  # hypotheses come as they finished; what came around the search is in its branch
            group = origins[number] if number < len(origins) else one.branch // groups[0].size
            if left[group]:
                left[group] -= 1
                best.append(one)
        return best

    def _rows(self, searches: Sequence[Search], beams: Sequence[tuple[Search, int]], group: int) -> list[list[int]]:
        """Which rows each request has in a group, -1 where it has none. All groups start from the same beam."""
        found: dict[str, list[int]] = {search.request_id: [] for search in searches}
        for row, (search, beam) in enumerate(beams):
            groups = self._groups[search.request_id]
            mine = group < len(groups) and not groups[group].done
            if mine and (search.length == 0 or beam // groups[0].size == group):
                found[search.request_id].append(row)
        widest = max(map(len, found.values()))
        return [mine + [-1] * (widest - len(mine)) for mine in found.values()]

    def _in_order(self, searches: Sequence[Search], parts: Mapping[int, tuple[torch.Tensor, ...]]) -> Candidates:
        """All candidates, request by request and group by group; notes how many each group has."""
        columns: list[list[torch.Tensor]] = [[], [], [], []]
        for i, search in enumerate(searches):
            self._counts[search.request_id] = {g: int(part[-1][i].sum()) for g, part in parts.items()}
            for *tensors, kept in parts.values():
                for column, tensor in zip(columns, tensors, strict=True):
                    column.append(tensor[i][kept[i]])
        return Candidates(*map(torch.cat, columns))

    def decide(self, search: Search, scores: Sequence[float], stops: Sequence[Stop | None]) -> Decision:
        groups, counts = self._groups[search.request_id], self._counts[search.request_id]
        size, start = groups[0].size, 0
        going: list[tuple[int, int]] = []
        finished: list[tuple[int, float]] = []
        for index, group in enumerate(groups):
            count = counts.get(index, 0)
            if group.done:
                continue
            beams, ended = self._split(search, range(start, start + count), scores, stops, size)
            start += count
            done = self._group_done(search, group, [score for _, score in ended], scores[start - count : start], size)
            if not done:  # those that run into the length limit are ranked as they are
                late = [number for number in beams if stops[number] is not None]
                ended += [(number, self.rank(search, scores[number], search.length + 1)) for number in late]
                going += [(index * size + i, number) for i, number in enumerate(beams) if stops[number] is None]
            finished += ended
            self._origins.setdefault(search.request_id, []).extend([index] * len(ended))
            self._closing.append((group, [score for _, score in ended], done or not beams))
        return Decision(going, finished)

    def _split(
        self, search: Search, numbers: range, scores: Sequence[float], stops: Sequence[Stop | None], size: int
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """Of a group's candidates the next beams, and what is finished."""
        beams: list[int] = []
        ended: list[tuple[int, float]] = []
        for rank, number in enumerate(numbers):
            stop = stops[number]
            if stop is None or stop.reason == "length":
                beams += [number] if len(beams) < size else []
            elif rank < size:
                ended.append((number, self.rank(search, scores[number], search.length + 1)))
        return beams, ended

    def _group_done(
        self, search: Search, group: Group, ended: Sequence[float], scores: Sequence[float], size: int
    ) -> bool:
        """Whether a group's search is over. ``scores`` are those of all its candidates, best first."""
        best = sorted([*group.finished, *ended], reverse=True)[:size]
        if len(best) < size:
            return False
        mode, length = search.sampling.early_stopping, search.length + 1
        if mode == 1:
            return True
        if mode != 0 and search.sampling.length_penalty > 0:
            length = search.most
        return best[-1] >= self.rank(search, scores[0], length)
