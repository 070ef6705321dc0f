"""Base classes of decoders: samplers turn one row of logits into one token, decoders own branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trtllm_core.plugin.lifecycle import SlotPlugin

if TYPE_CHECKING:
    import torch

    from trtllm_core.plugin.views import BranchView, LogitsBatch


@dataclass(frozen=True, slots=True)
class DecoderCapabilities:
    """What a decoder can do and what it must be given."""

    greedy: bool = False
    """It always takes the largest logit: processors that are ``argmax_invariant`` may be skipped."""
    graph_safe: bool = False
    needs: frozenset[str] = frozenset()
    """Of ``kv_fork``, ``kv_rewind``, ``multi_position``, ``hidden_states``, ``tree_mask``."""


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """How many branches a request starts with and may have, and how many positions a row may verify at once."""

    branches: int = 1
    max_branches: int = 1
    max_positions: int = 1


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens to run through the model in one step, to be verified: a chain, or a tree by ``parents``."""

    tokens: torch.Tensor
    """int64 ``[rows, k]``."""
    counts: torch.Tensor
    """int64 ``[rows]``: how many of the k are meant."""
    parents: torch.Tensor | None = None
    """int64 ``[rows, k]``: index of each token's parent in the proposal, -1 for the last committed token; None: a
    chain."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step chose."""

    tokens: torch.Tensor
    """int64 ``[n, k]``, on the device."""
    counts: torch.Tensor
    """int64 ``[n]``: 0..k tokens accepted by each row."""
    log_probs: torch.Tensor | None = None
    """float32 ``[n, k]``: of the chosen tokens, over the whole vocabulary, after the processors."""
    parents: Sequence[int] | None = None
    """For each row, the slot whose history it continues; None: its own."""
    spawn: Sequence[tuple[int, int]] = ()
    """(slot to copy, branch number) of branches to add."""
    kill: Sequence[int] = ()
    """Slots of branches to drop."""
    revised: Sequence[int] = ()
    """Slots whose earlier tokens changed: a stream must be told."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence of a request, best first."""

    tokens: Sequence[int]
    score: float = 0.0
    log_probs: Sequence[float] = field(default=())


class Sampler(SlotPlugin):
    """Chooses one token for each position, from processed logits."""

    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities()

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """int64 ``[n]`` of token ids for ``logits`` (float32 ``[n, vocab_size_padded]``), which may be overwritten.

        Rows of requests that chose another decoder come along; what is returned for them is thrown away.
        """
        raise NotImplementedError


class Decoder(SlotPlugin):
    """A search strategy that owns the branches of a request."""

    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities()

    def plan(self, view: BranchView) -> BranchPlan:
        """Called once a request, before it is admitted."""
        return BranchPlan()

    def propose(self, batch: LogitsBatch) -> Proposal | None:
        """Tokens for the model to verify in the next step; None runs each branch's last token."""
        return None

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        """Choose from processed ``logits`` (float32 ``[n, vocab_size_padded]``)."""
        raise NotImplementedError

    def finalize(self, request_id: str, slots: Sequence[int]) -> Sequence[Hypothesis]:
        """Called when a request ends: its sequences, best first. Empty: each branch as it stands."""
        return ()
