"""Base classes of decoders: samplers turn one row of logits into one token, decoders own branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

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
    per_position: bool = False
    """Of a sampler: behind drafts it takes what it would take had they been committed, so that it can be asked about
    several positions of a branch at once."""
    graph_safe: bool = False
    """Of a sampler: ``sample`` and ``commit`` may be captured in a CUDA graph, as of ``LogitsCapabilities``."""
    needs: frozenset[str] = frozenset()
    """Of ``kv_fork``, ``kv_rewind``, ``multi_position``, ``tree_mask``, and of what the decoder's ``host`` can do for
    each of its requests: ``sampler`` (``host.sample``), ``distribution`` (``host.distribution``), ``hidden_states``
    (``host.look``). With ``logits``, ``commit`` is shown what the tokens were chosen from."""


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """How many branches a request has. Slots and cache for all of them are set aside before it starts."""

    branches: int = 1
    """With how many it starts. They share the prompt, which runs once, and each draws random numbers of its own."""
    max_branches: int = 1
    """How many it may have later. The slots beyond ``branches`` rest until ``Survivors`` names them."""
    max_positions: int = 1
    """How many positions a row may verify at once: one more than ``propose`` names. Where a plugin of the request
    cannot take part in that, it is 1, and the plan's notes say why."""
    returns: int = 1
    """How many sequences the user gets."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens to run through the model in one step, to be verified: of each row a chain of drafts."""

    tokens: torch.Tensor
    """int64 ``[rows, k]``."""
    counts: torch.Tensor
    """int64 ``[rows]``: how many of the k are meant, 0..k. The core may run fewer: what a step has room for."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step chose, where each branch goes on by itself. A row is a branch: in a verify step there are fewer rows
    than positions."""

    tokens: torch.Tensor
    """int64 ``[rows, k]``, on the device."""
    counts: torch.Tensor
    """int64 ``[rows]``: 1..k tokens accepted by each row, the j-th of them chosen at the row's j-th position."""
    log_probs: torch.Tensor | None = None
    """float32 ``[rows, k]``: of the chosen tokens, over the whole vocabulary, after the processors; None: the core
    works them out where they are asked for."""


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

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """float32 ``[n, vocab_size_padded]``: the exact probabilities with which ``sample`` takes each token.

        Optional: what decoders that accept drafts by their probability need. ``logits`` may be overwritten.
        """
        raise NotImplementedError


class DecoderHost(Protocol):
    """What the core does for a decoder: each row by what its own request asked for. ``active`` rows alone count."""

    def process(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """Run the requests' logits processors on raw ``logits``, such as a draft model's, at positions that
        ``batch.offset`` and ``batch.draft`` describe. Returns a new tensor of the same shape."""

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """int64 ``[n]``: what the requests' samplers take from processed ``logits``, which stay as they are."""

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """float32 ``[n, vocab_size_padded]``: the samplers' probabilities. ``logits`` stay as they are."""

    def look(
        self, source: Sequence[int | None], resting: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Final hidden states of tokens that are no text, or not yet: float32 ``[tokens in all, hidden_size]``.

        ``tokens[i]`` run in slot ``resting[i]``, behind the text of the branch in slot ``source[i]``; None: behind
        nothing, from the beginning. The resting slots are of the same request, each named once, and what runs there
        changes no branch. Only in ``select``, where the cache holds all of the branches' text. ``looks`` says
        before the step how many tokens that are going to be, so that there is room for them.

        Raises:
            OutOfBlocksError: the cache has no room for it.
        """


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
    host: DecoderHost
    """Set by the core before ``setup``."""

    def plan(self, view: BranchView) -> BranchPlan:
        """Called before a request is admitted, maybe more than once, and maybe before ``setup``. ``view.slot`` is -1.

        More branches than the engine has slots, or than ``max_beam_width`` where their number grows, are refused.
        """
        return BranchPlan()

    def propose(self, batch: LogitsBatch) -> Proposal | None:
        """Tokens for the model to verify in the coming step, one row for each branch; None: none for anybody.

        Pure. Asked before each step for branches that generate, where ``plan`` said that there may be several
        positions. Rows that are not ``active`` are other decoders'.
        """
        return None

    def looks(self, slots: Sequence[int]) -> dict[int, int]:
        """What ``select`` is going to run in resting slots (``host.look``) for branches in ``slots``, which choose a
        token in the coming step: by resting slot, how many tokens it will hold at most, the text before them included.

        Asked before each such step, maybe more than once. Where the cache has no room for them, a request is put off
        and computed anew, as it is where there is none for its text. The default runs none.
        """
        return {}

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection | Candidates:
        """Choose from processed ``logits`` (float32 ``[n, vocab_size_padded]``), which may be overwritten. Pure.

        A ``Selection`` is for all rows, those that are not ``batch.active`` included, whose entries are thrown away.
        In a verify step ``batch.starts`` says where rows begin, and ``batch.draft`` holds what was proposed; a decoder
        none of whose rows has drafts is shown one position of each, as in any other step.
        ``Candidates`` are for active rows alone.
        """
        raise NotImplementedError

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        """Choose among ``candidates``, of which ``stops`` says how each ends its sequence; None: it does not.

        A candidate that stops can finish and cannot go on. State moves in ``commit``, after ``fork``.
        """
        raise NotImplementedError

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """What ``Candidates.log_probs`` would be for every token: float32 ``[n, vocab_size_padded]``, for processed
        ``logits`` of that shape, which stay as they are. Asked where the request of a search sees the likeliest tokens.
        """
        return logits.log_softmax(dim=1)

    def finalize(self, request_id: str, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Called once, when a request ends: what the user gets, best first. The core keeps the first ``returns``.

        The default ranks by score; among equals, what finished first comes first.
        """
        return sorted(hypotheses, key=lambda one: -one.score)
