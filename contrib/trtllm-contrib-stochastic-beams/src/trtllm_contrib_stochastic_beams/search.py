"""The search: the k sequences with the largest perturbed log-probabilities, found top-down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from trtllm_core.device import copy_slots, draw_salt, uniform, uniform_rows
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import (
    BranchPlan,
    BranchView,
    Candidates,
    CommitBatch,
    Decoder,
    DecoderCapabilities,
    DecodingContext,
    LogitsBatch,
    Stop,
    Survivors,
)

ROOT, *SALTS = (draw_salt("stochastic_beam_search", draw) for draw in range(3))


@dataclass(frozen=True, slots=True)
class Perturbed(Candidates):
    """Candidates whose ``scores`` are log-probabilities φ of sequences, with ``keys``, float64 ``[m]``: their G."""

    keys: torch.Tensor


@dataclass
class Search:
    """One request."""

    k: int
    slots: list[int] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    """G of the sequences that are complete."""


class StochasticBeamSearch(Decoder):
    """Draws ``num_beams`` sequences without replacement (algorithm 1 of the paper). Their ``score`` is G.

    A complete sequence keeps its place among the k while no more than k − 1 others have a larger G: none of the
    continuations of a sequence can have a larger one than it has.
    """

    capabilities = DecoderCapabilities(needs=frozenset({"kv_fork"}))

    def setup(self, context: DecodingContext) -> None:
        """State by slot: φ and G of the beam there."""
        self.context = context
        self.phi = torch.zeros(context.slots, dtype=torch.float64, device=context.device)
        self.g = torch.zeros_like(self.phi)
        self.searches: dict[str, Search] = {}
        self.of: dict[int, str] = {}
        self.settled: tuple[list[int], torch.Tensor, torch.Tensor, list[tuple[Search, float]]] | None = None

    def plan(self, view: BranchView) -> BranchPlan:
        """One beam to start with, which is the empty sequence, and k later."""
        k, returns = view.sampling.num_beams, view.sampling.num_return_sequences
        if returns > k:
            raise ConfigError(f"num_return_sequences={returns}: a search with {k} beams returns at most {k}")
        return BranchPlan(branches=1, max_branches=k, returns=returns)

    def begin(self, slot: int, view: BranchView) -> None:
        """A slot of a request, resting ones included."""
        # The empty sequence: φ = 0. Its G, the largest of all, is drawn, so that scores are not conditioned on it.
        u = uniform(self.context.seeds[slot : slot + 1], torch.zeros_like(self.context.seeds[:1]), ROOT).double()
        self.phi[slot], self.g[slot] = 0.0, -torch.log(-torch.log(u - 2.0**-25))[0]
        self.of[slot] = view.request_id
        self.searches.setdefault(view.request_id, Search(view.sampling.num_beams)).slots.append(slot)

    def end(self, slot: int) -> None:
        """The request is over."""
        self.searches.pop(self.of.pop(slot), None)

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Perturbed:
        """The continuations with the largest G of each beam."""
        at = batch.active.nonzero().squeeze(1)
        slot = batch.slot[at]
        gains = logits[at].double().log_softmax(dim=1)
        phi = self.phi[slot].unsqueeze(1) + gains
        g = conditioned(phi + self.gumbel(slot, logits.shape[1]), self.g[slot].unsqueeze(1))
        widest = max(self.searches[self.of[each]].k for each in slot.tolist())
        keys, tokens = g.topk(min(widest, g.shape[1]), dim=1)
        order = keys.flatten().argsort(descending=True, stable=True)
        order = order[keys.flatten()[order] > -torch.inf]  # what a processor forbade
        row, token = order // keys.shape[1], tokens.flatten()[order]
        return Perturbed(slot[row], token, phi[row, token].float(), gains[row, token].float(), keys.flatten()[order])

    def gumbel(self, slot: torch.Tensor, width: int) -> torch.Tensor:
        """Standard Gumbel numbers that belong to the beams and their positions: float64 ``[n, width]``."""
        seeds, lengths = self.context.seeds[slot], self.context.lengths[slot]
        high, low = (uniform_rows(seeds, lengths, salt, width).double() for salt in SALTS)
        u = (high - 2.0**-24 + low * 2.0**-24).clamp(2.0**-50, 1 - 2.0**-50)  # 24 bits would repeat the largest
        return -torch.log(-torch.log(u))

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        """The k largest G among what is complete and what could go on."""
        assert isinstance(candidates, Perturbed)
        going: list[tuple[int, int, float]] = []
        done: list[tuple[int, float]] = []
        keys, owners = candidates.keys.tolist(), [self.of[slot] for slot in candidates.slot.tolist()]
        free = {name: list(self.searches[name].slots) for name in dict.fromkeys(owners)}
        for name in free:
            search, mine = self.searches[name], [i for i, owner in enumerate(owners) if owner == name]
            ranked = sorted([*search.finished, *(keys[i] for i in mine)], reverse=True)
            least = ranked[: search.k][-1]
            for i in (i for i in mine if keys[i] >= least):
                if stops[i] is None:
                    going.append((free[name].pop(0), i, keys[i]))
                else:
                    done.append((i, keys[i]))
        index = torch.tensor([i for _, i, _ in going], dtype=torch.int64, device=candidates.slot.device)
        ended = [(self.searches[owners[i]], key) for i, key in done]
        phi = candidates.scores[index].double()
        self.settled = [slot for slot, _, _ in going], phi, candidates.keys[index], ended
        return Survivors(going, done)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies; ``commit`` writes what is new."""
        copy_slots(src, dst, self.phi, self.g)

    def commit(self, batch: CommitBatch) -> None:
        """The survivors are in their slots."""
        if self.settled is not None:
            slots, phi, keys, ended = self.settled
            self.phi[slots], self.g[slots], self.settled = phi, keys, None
            for search, key in ended:
                search.finished.append(key)


def conditioned(g: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Gumbel numbers ``g`` (``[n, m]``) given that the largest of each row is ``most`` (``[n, 1]``): appendix B.3."""
    largest = g.amax(dim=1, keepdim=True)
    v = most - g + torch.log1p(-torch.exp(g - largest).clamp(max=1))
    return most - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
