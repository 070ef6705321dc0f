"""The built-in samplers: the largest logit, the whole distribution, and the classic runtime's top-k and top-p."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import torch

from trtllm_core.decoding import kernels
from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.decoding.ranking import border, largest, masses, part, reaches
from trtllm_core.decoding.state import copy_slots
from trtllm_core.decoding.top_p_decay import TopPDecay
from trtllm_core.plugin.decoder import NO_TOKEN, DecoderCapabilities, Sampler
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch


_NOTHING = 2.0**-60
"""A share of the probability that the likeliest token alone exceeds."""


def log_probs(logits: torch.Tensor, tokens: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of chosen tokens under the softmax over the whole vocabulary.

    Args:
        logits: float32 ``[n, vocab]``.
        tokens: int64 ``[rows, k]``; what is undefined there, or no token, gets an undefined value.
        source: int64 ``[rows, k]``: which of the n rows each token is from; None: each row's from that row.

    Returns:
        float32 ``[rows, k]``.
    """
    tokens, total = tokens.clamp(0, logits.shape[1] - 1), logits.logsumexp(dim=1)
    if source is None:
        return logits.gather(1, tokens) - total.unsqueeze(1)
    return logits[source, tokens] - total[source]


def possible(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``tokens`` (int64 ``[n]``), and -1 where even the chosen one is forbidden: then all of them are."""
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.where(chosen == -torch.inf, NO_TOKEN, tokens)


class Greedy(Sampler):
    """The largest logit; among equals, the lowest token id."""

    capabilities = DecoderCapabilities(greedy=True, per_position=True, graph_safe=True)

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        if kernels.takes(logits) and logits.stride(1) == 1:
            from trtllm_core.decoding.kernels.greedy import largest_logit

            return largest_logit(logits)
        return possible(logits, logits.argmax(dim=1))

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)


class Multinomial(Sampler):
    """One token of the softmax over all logits, whatever the processors have left of them."""

    capabilities = DecoderCapabilities(per_position=True, graph_safe=True)

    SALT = draw_salt("multinomial")

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return possible(logits, draw(masses(logits), batch_uniform(batch, self.SALT).unsqueeze(1)).squeeze(1))

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return logits.softmax(dim=1)


def draw(weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Walk tokens by id until ``share`` (float32 ``[n, 1]`` in (0, 1]) of all ``weights`` is reached.

    With a uniform share, a token's probability is its part of the weights.

    Args:
        weights: int64 ``[n, vocab]``; afterwards their running sums: a second tensor of this size is dear.
        share: as above.

    Returns:
        int64 ``[n, 1]``.
    """
    sums = weights.cumsum_(dim=1)
    return reaches(sums, part(share, sums[:, -1:]))


class _Choice(NamedTuple):
    """What a request asks for, in the terms of ``TopKTopP``."""

    k: int
    """0: the whole vocabulary."""
    p: float
    nucleus: bool
    """Whether p is of the whole vocabulary, and below 1 or going to be."""

    @classmethod
    def of(cls, sampling: SamplingConfig, vocab_size: int) -> _Choice:
        """The classic meaning of 0: neither is greedy, and k alone keeps all of the k."""
        k, p = min(sampling.top_k, vocab_size), sampling.top_p
        if k == 0 and p == 0:
            k = 1
        p = p or 1.0
        return cls(k, p, k == 0 and (p < 1 or TopPDecay.falls(sampling)))


class TopKTopP(Sampler):
    """Top-k, then top-p, with the classic runtime's arithmetic.

    The k largest logits (k = 0: all) are ordered, equals by token id. With ``e_i = exp(x_i − x_max)`` and ``S`` their
    sum over the k, ``r = u·p·S`` is drawn and the first token taken at which the running sum reaches it. So the nucleus
    is measured on the renormalised top k, and the token at its border gets only that part of its mass which is inside.
    ``top_p_decay`` and its companions change p as the text grows.

    With k > 0 the largest k are ordered; p < 1 over the whole vocabulary is a search for the token at which the sum
    reaches r; p = 1 needs no order and walks by token id. What some live branch needs is done for all rows, and a row's
    token is the same whatever the others in its batch ask for.
    """

    capabilities = DecoderCapabilities(per_position=True, graph_safe=True)
    examples = (
        Example(sampling={"top_k": 5, "top_p": 0.9}),
        Example(sampling={"top_k": 0, "top_p": 0.8}),
        Example(sampling={"top_k": 0, "top_p": 1.0}),
        Example(sampling={"top_k": 0, "top_p": 0.8, "top_p_decay": 0.9, "top_p_min": 0.3, "top_p_reset_ids": 3}),
    )

    SALT = draw_salt("top_k_top_p")

    _k: torch.Tensor
    _p: torch.Tensor
    _nucleus: torch.Tensor
    _decay: TopPDecay

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size_padded
        self._k = torch.ones(context.slots, dtype=torch.int64, device=context.device)
        self._p = torch.ones(context.slots, device=context.device)
        self._nucleus = torch.zeros(context.slots, dtype=torch.bool, device=context.device)
        self._decay = TopPDecay(context)
        self._live: dict[int, _Choice] = {}
        self._plan()

    @property
    def graph_key(self) -> Hashable:
        return self._width, self._searches, self._walks, self._decay.key

    def begin(self, slot: int, view: BranchView) -> None:
        choice = _Choice.of(view.sampling, self._vocab_size)
        for state, value in zip((self._k, self._p, self._nucleus), choice, strict=True):
            state[slot].fill_(value)
        self._decay.begin(slot, view.sampling)
        self._live[slot] = choice
        self._plan()

    def end(self, slot: int) -> None:
        self._live.pop(slot, None)
        self._decay.end(slot)
        self._plan()

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._k, self._p, self._nucleus)
        self._decay.fork(src, dst)

    def _plan(self) -> None:
        """What the live branches need: the ``width`` largest logits in order (0: none), a search, a walk by id."""
        choices = set(self._live.values())
        most = max((choice.k for choice in choices), default=0)
        # Powers of two, so that there are few graphs to capture.
        self._width = min(1 << (most - 1).bit_length(), self._vocab_size) if most else 0
        self._searches = any(choice.nucleus for choice in choices)
        self._walks = any(choice.k == 0 and not choice.nucleus for choice in choices)

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        u = batch_uniform(batch, self.SALT).unsqueeze(1)
        share = u * self._decay.apply(self._p.index_select(0, batch.slot), batch).unsqueeze(1)
        k = self._k.index_select(0, batch.slot).unsqueeze(1)
        tokens = torch.zeros_like(k)
        nucleus = self._nucleus.index_select(0, batch.slot).unsqueeze(1)
        weights = masses(logits) if self._walks else None
        if self._searches:
            # A row that does not search is done at its first token.
            tokens = border(logits, torch.where(nucleus, share, _NOTHING), weights)
        if weights is not None:
            tokens = torch.where(nucleus, tokens, draw(weights, share))
        if self._width:
            ids = largest(logits, self._width)
            sums = masses(logits.gather(1, ids)).cumsum(dim=1)
            total = sums.gather(1, k.clamp(1, self._width) - 1)
            tokens = torch.where(k > 0, ids.gather(1, reaches(sums, part(share, total))), tokens)
        return possible(logits, tokens.squeeze(1))

    def distribution(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """See ``Sampler``: of the ordered masses those below k, and of their sum the part below p."""
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        k = self._k.index_select(0, batch.slot).unsqueeze(1)
        weights = (values - values[:, :1]).double().exp_()
        weights.masked_fill_((torch.arange(weights.shape[1], device=k.device) >= k) & (k > 0), 0)
        sums = weights.cumsum(dim=1)
        inside = sums[:, -1:] * self._decay.apply(self._p.index_select(0, batch.slot), batch).double().unsqueeze(1)
        shares = (torch.minimum(sums, inside) - (sums - weights)).clamp_(min=0) / inside
        return torch.zeros_like(logits).scatter_(1, ids, shares.float())
