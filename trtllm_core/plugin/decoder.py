"""Base classes of decoders: samplers turn one row of logits into one token, decoders own branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trtllm_core.plugin.lifecycle import SlotPlugin

if TYPE_CHECKING:
    import torch

    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import BranchView, FinishReason, LogitsBatch


NO_TOKEN = -1
"""What a sampler returns where every token is forbidden."""


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
    """How many branches a request has. Slots and cache for all of them are set aside before it starts."""

    branches: int = 1
    """With how many it starts. They share the prompt, which runs once, and each draws random numbers of its own."""
    max_branches: int = 1
    """How many it may have later. The slots beyond ``branches`` rest until ``Survivors`` names them."""
    max_positions: int = 1
    """How many positions a row may verify at once."""
    returns: int = 1
    """How many sequences the user gets."""


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
    """What a step chose, where each branch goes on by itself."""

    tokens: torch.Tensor
    """int64 ``[n, k]``, on the device."""
    counts: torch.Tensor
    """int64 ``[n]``: 1..k tokens accepted by each row."""
    log_probs: torch.Tensor | None = None
    """float32 ``[n, k]``: of the chosen tokens, over the whole vocabulary, after the processors; None: the core works
    them out where they are asked for."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Continuations that a search decoder weighs. All tensors are on the device, best first within a request.

    Name a few more than can survive: the core holds each against the stopping rules before the decoder chooses.
    """

    slot: torch.Tensor
    """int64 ``[m]``: the branch that each would continue. Many may continue one."""
    tokens: torch.Tensor
    """int64 ``[m]``: the next token."""
    scores: torch.Tensor
    """float32 ``[m]``: what the sequence up to this token is worth. It becomes the sequence's ``cum_log_prob``."""
    log_probs: torch.Tensor
    """float32 ``[m]``: of the token alone."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """What becomes of the candidates of a step. Indices count into ``Candidates``."""

    branches: Sequence[tuple[int, int, float]] = ()
    """(slot, candidate, score): the branches that run in the next step, each in a slot of its request. A slot takes
    over the history of the candidate's branch, all at the same time. Slots of the request that are not named rest, and
    a request of which none is named is over. The score is what the branch would be ranked by if something ended it."""
    finished: Sequence[tuple[int, float]] = ()
    """(candidate, score): sequences that are complete with this token, and what they are ranked by."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence of a request."""

    tokens: Sequence[int]
    """Generated tokens, the one that ended it included."""
    score: float = 0.0
    """What it is ranked by, where a search found it."""
    reason: FinishReason = ""
    """``search`` where its decoder ended it."""
    branch: int = 0
    """Number of the branch that it ended in."""
    cum_log_prob: float = 0.0
    """As its decoder counts; for samplers the sum of ``log_probs``, where those were asked for."""
    log_probs: Sequence[float] = field(default=())
    """One a token, where they were asked for."""
    text: str = ""
    """Where the request asked for text."""
    stop: Stop | None = None
    """What ended it; None where the request ended around it."""
    top_log_probs: Sequence[Mapping[int, float]] = field(default=())
    """Where asked for, beside each token the likeliest ones and their log-probabilities."""
    logits: Sequence[torch.Tensor] = field(default=())
    """What each token was chosen from, where the engine gathers it: float32 ``[vocab_size_padded]``, on the CPU."""

    @property
    def length(self) -> int:
        """Generated tokens of the text: an end token is there, but does not count."""
        return len(self.tokens) - (self.stop is not None and not self.stop.counted)


class Sampler(SlotPlugin):
    """Chooses one token for each position, from processed logits.

    With ``num_return_sequences`` = n a request has n branches, which share the prompt's cache.
    """

    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities()

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """int64 ``[n]`` of token ids for ``logits`` (float32 ``[n, vocab_size_padded]``), which may be overwritten.

        Rows of requests that chose another decoder come along; what is returned for them is thrown away. -1 says that
        every token is forbidden: the request ends with an error that says so.
        """
        raise NotImplementedError


class Decoder(SlotPlugin):
    """A strategy that owns the branches of a request.

    Each step ``select`` answers in one of two ways. With a :class:`Selection` every branch goes on by itself. With
    :class:`Candidates` it is a search: the core asks the stopping rules about each candidate, and then ``survive``
    says which of them go on, in which slot, and which are finished. So a beam that stops becomes a hypothesis, and
    its place goes to another. Forks of history, cache, processors, criteria and text follow from the answer.

    ``begin`` is called for every slot that ``plan`` asked for, resting ones included: ``view.request_id`` and
    ``view.branch`` say whose it is.
    """

    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities()
    processors: ClassVar[tuple[str, ...]] = ()
    """Registered names of logits processors that its requests get beside those that they ask for."""

    def plan(self, view: BranchView) -> BranchPlan:
        """Called before a request is admitted, maybe more than once, and maybe before ``setup``. ``view.slot`` is -1.

        More branches than the engine has slots, or than ``max_beam_width`` where their number grows, are refused.
        """
        return BranchPlan()

    def propose(self, batch: LogitsBatch) -> Proposal | None:
        """Tokens for the model to verify in the next step; None runs each branch's last token."""
        return None

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection | Candidates:
        """Choose from processed ``logits`` (float32 ``[n, vocab_size_padded]``), which may be overwritten. Pure.

        A ``Selection`` is for all rows, those that are not ``batch.active`` included, whose entries are thrown away.
        ``Candidates`` are for active rows alone.
        """
        raise NotImplementedError

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        """Choose among ``candidates``, of which ``stops`` says how each ends its sequence; None: it does not.

        A candidate that stops can finish and cannot go on. State moves in ``commit``, after ``fork``.
        """
        raise NotImplementedError

    def finalize(self, request_id: str, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Called once, when a request ends: what the user gets, best first. The core keeps the first ``returns``.

        The default ranks by score; among equals, what finished first comes first.
        """
        return sorted(hypotheses, key=lambda one: -one.score)
