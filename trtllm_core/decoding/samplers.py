"""The built-in samplers: the largest logit, and the classic runtime's top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import torch

from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.decoding.state import copy_slots
from trtllm_core.plugin.decoder import DecoderCapabilities, Sampler

if TYPE_CHECKING:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch

_SALT = draw_salt("top_k_top_p")


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of chosen tokens under the softmax over the whole vocabulary.

    Args:
        logits: float32 ``[n, vocab]``.
        tokens: int64 ``[n, k]``; what is undefined there, or no token, gets an undefined value.

    Returns:
        float32 ``[n, k]``.
    """
    return logits.gather(1, tokens.clamp(0, logits.shape[1] - 1)) - logits.logsumexp(dim=1, keepdim=True)


class Greedy(Sampler):
    """The largest logit; among equals, the lowest token id."""

    capabilities = DecoderCapabilities(greedy=True, graph_safe=True)

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        return logits.argmax(dim=1)


class _Choice(NamedTuple):
    """What a request asks for, in the terms of ``TopKTopP``."""

    k: int
    """0: the whole vocabulary."""
    p: float

    @classmethod
    def of(cls, sampling: SamplingConfig, vocab_size: int) -> _Choice:
        """The classic meaning of 0: neither is greedy, and k alone keeps all of the k."""
        k, p = sampling.top_k, sampling.top_p
        if k == 0:
            return cls(0, p) if p > 0 else cls(1, 1.0)
        return cls(min(k, vocab_size), p if p > 0 else 1.0)


class TopKTopP(Sampler):
    """Top-k, then top-p, with the classic runtime's arithmetic.

    The k largest logits (k = 0: all) are ordered, equals by token id. With ``e_i = exp(x_i − x_max)`` and ``S`` their
    sum over the k, ``r = u·p·S`` is drawn and the first token taken at which the running sum reaches it. So the nucleus
    is measured on the renormalised top k, and the token at its border gets only that part of its mass which is inside.

    Ordering is the dear part, so each request's choice decides how much of it is done: with k > 0 only the largest k
    are ordered; p = 1 over the whole vocabulary needs no order and walks it by token id; only p < 1 over the whole
    vocabulary sorts it. A request's token is the same whatever the others in its batch ask for.
    """

    capabilities = DecoderCapabilities(graph_safe=True)

    _k: torch.Tensor
    _p: torch.Tensor
    _unordered: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size_padded
        self._k = torch.ones(context.slots, dtype=torch.int64, device=context.device)
        self._p = torch.ones(context.slots, device=context.device)
        self._unordered = torch.zeros(context.slots, dtype=torch.bool, device=context.device)
        self._live: dict[int, _Choice] = {}
        self._width, self._any_unordered = 1, False

    @property
    def graph_key(self) -> Hashable:
        return self._width, self._any_unordered

    def begin(self, slot: int, view: BranchView) -> None:
        choice = _Choice.of(view.sampling, self._vocab_size)
        self._k[slot] = choice.k or self._vocab_size
        self._p[slot] = choice.p
        self._unordered[slot] = choice == (0, 1.0)
        self._live[slot] = choice
        self._plan()

    def end(self, slot: int) -> None:
        self._live.pop(slot, None)
        self._plan()

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._k, self._p, self._unordered)

    def _plan(self) -> None:
        """How many of the largest logits must be ordered for the live branches; 0 is none."""
        choices = set(self._live.values())
        self._any_unordered = (0, 1.0) in choices
        ordered = [choice.k or self._vocab_size for choice in choices if choice != (0, 1.0)]
        # Powers of two, so that there are few graphs to capture.
        self._width = min(1 << (max(ordered) - 1).bit_length(), self._vocab_size) if ordered else 0

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        u = batch_uniform(batch, _SALT).unsqueeze(1)
        if not self._width:
            return _walk(logits.softmax(dim=1), u).squeeze(1)
        ids = self._largest(logits)
        values = logits.gather(1, ids)
        k = self._k[batch.slot].unsqueeze(1).clamp(max=self._width)
        place = _walk((values - values[:, :1]).exp_(), u * self._p[batch.slot].unsqueeze(1), k)
        tokens = ids.gather(1, place)
        if self._any_unordered:
            everywhere = _walk(logits.softmax(dim=1), u)
            tokens = torch.where(self._unordered[batch.slot].unsqueeze(1), everywhere, tokens)
        return tokens.squeeze(1)

    def _largest(self, logits: torch.Tensor) -> torch.Tensor:
        """Ids of the ``width`` largest logits, int64 ``[n, width]``, in order; equals by id."""
        if self._width == self._vocab_size:
            return logits.sort(dim=1, descending=True, stable=True).indices
        return largest(logits, self._width)


def largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` largest logits of each row, in order; equals by id, about which ``torch.topk`` promises nothing.

    The k largest are in the k runs of neighbours that have the largest maxima, equals by place: a token of any other
    run has k others before it. So one cheap pass over the vocabulary leaves few candidates.

    Args:
        logits: float32 ``[n, vocab]``.
        k: at most ``vocab``.

    Returns:
        int64 ``[n, k]``: their ids.
    """
    vocab = logits.shape[1]
    ids = torch.arange(vocab, device=logits.device).expand_as(logits)
    if vocab >= 4 * k:
        run = 1 << math.isqrt(vocab // k).bit_length()  # makes runs and candidates about equally many
        whole = vocab // run * run
        maxima = logits[:, :whole].view(len(logits), -1, run).amax(dim=2)
        runs = ids.gather(1, _ordered(maxima, ids[:, : maxima.shape[1]]).topk(k, dim=1).indices)
        candidates = (runs.unsqueeze(2) * run + ids[0, :run]).flatten(1)
        ids = torch.cat([candidates, ids[:, whole:]], dim=1)
        logits = logits.gather(1, ids)
    return ids.gather(1, _ordered(logits, ids).topk(k, dim=1).indices)


def _ordered(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort as ``values`` (float32) do, and where those are equal, from high to low ``ids``."""
    bits = values.contiguous().view(torch.int32)
    # A float's sign and magnitude as two's complement sorts as the float; -0.0 becomes 0.
    bits = torch.where(bits < 0, -(2**31) - bits, bits)
    return (bits.long() << 32) - ids


def _walk(masses: torch.Tensor, share: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """Where the running sum of ``masses`` first reaches ``share`` of the sum of the first ``count`` (None: all).

    Args:
        masses: float32 ``[n, m]``, >= 0.
        share: float32 ``[n, 1]`` in (0, 1].
        count: int64 ``[n, 1]``, 1..m.

    Returns:
        int64 ``[n, 1]``, below ``count``.
    """
    sums = masses.cumsum(dim=1)
    last = masses.shape[1] - 1 if count is None else count - 1
    total = sums[:, -1:] if count is None else sums.gather(1, count - 1)
    place: torch.Tensor = torch.searchsorted(sums, share * total)
    return place.clamp(max=last)
