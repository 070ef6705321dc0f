"""What a step chose, before and after the stopping rules saw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trtllm_core.decoding.stages import Scores, Stage
    from trtllm_core.decoding.stopping import Verdict
    from trtllm_core.plugin import Candidates, Decoder, Selection, Stop, Survivors


@dataclass(frozen=True, slots=True)
class Search:
    """What one search decoder weighs in a step."""

    stage: Stage[Decoder]
    candidates: Candidates
    slots: Sequence[int]
    """``candidates.slot`` on the host."""
    asked: Sequence[int]
    """The decoder's slots in this step."""
    likeliest: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """By slot, where its request wants to see them: the likeliest tokens behind the branch, and their
    log-probabilities."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows of new tokens, each behind the history of a slot. The rows of searches, one a candidate, come last; several
    of them may have the same slot."""

    slot: torch.Tensor
    """int64 ``[n]``."""
    slots: list[int]
    """The same on the host."""
    selection: Selection
    searches: Sequence[Search] = ()
    source: torch.Tensor | None = None
    """int64 ``[n, k]``: the row of the logits that each token is from; None: each row's tokens from that row."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search decided, checked."""

    search: Search
    start: int
    """Row of the step's choice at which its candidates begin."""
    survivors: Survivors
    scores: Sequence[float]
    """By candidate."""
    log_probs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is to be committed: rows of new tokens, each of another slot, after forks."""

    slot: torch.Tensor
    """int64 ``[n]``."""
    slots: list[int]
    tokens: torch.Tensor
    """int64 ``[n, k]``."""
    new: list[list[int]]
    """The same on the host, before any cut."""
    stops: list[Stop | None]
    verdict: Verdict
    """Of the step's choice. Its first rows are those here that belong to no search."""
    log_probs: list[list[float]] | None = None
    """One list a row; None: nobody asked."""
    forks: Mapping[int, int] = field(default_factory=dict)
    """Slot to the slot whose history it takes over."""
    found: Sequence[Found] = ()
    scores: Scores | None = None
    """Where the tokens came from; None where no plugin needs it."""
    likeliest: Sequence[Sequence[Mapping[int, float]]] | None = None
    """The likeliest tokens beside each new one of a row; None: nobody asked."""
