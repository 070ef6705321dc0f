"""Logits processors that leave the likeliest tokens and drop the rest: their logits become -inf."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import torch

from trtllm_core.decoding.ranking import border, crossing, largest, masses, part
from trtllm_core.decoding.state import copy_slots, per_row
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.logits import DeviceLogitsProcessor, LogitsCapabilities, Phase

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch

_LEAST = torch.finfo(torch.float32).min


class Truncation(DeviceLogitsProcessor):
    """One number for each slot, and a rule that says which logits stay. The likeliest token always does."""

    phase = Phase.TRUNCATION
    capabilities = LogitsCapabilities(argmax_invariant=True, speculation="per_position", graph_safe=True)

    FIELD: ClassVar[str]
    """Field of SamplingConfig that holds the number."""
    OFF: ClassVar[float]
    """The number at which nothing is dropped."""

    _value: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._value = torch.full((context.slots,), self.OFF, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        self._value[slot].fill_(getattr(view.sampling, self.FIELD))

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        logits.masked_fill_(self.dropped(logits, per_row(self._value, batch, neutral=self.OFF)), -math.inf)

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """bool ``[n, vocab]`` for ``logits`` (float32 ``[n, vocab]``) and each row's number (float32 ``[n, 1]``)."""
        raise NotImplementedError

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._value)


class TopK(Truncation):
    """Keeps the ``top_k`` largest logits, and those that equal the smallest of them. 0 keeps all."""

    FIELD, OFF = "top_k", 0.0
    examples = (
        Example(sampling={"decoder": "multinomial", "top_k": 5}),
        Example(sampling={"decoder": "multinomial", "top_k": 2}),
    )

    def setup(self, context: DecodingContext) -> None:
        super().setup(context)
        self._vocab_size = context.vocab_size_padded
        self._live: dict[int, int] = {}
        self._width = 1

    @property
    def graph_key(self) -> Hashable:
        return self._width

    def begin(self, slot: int, view: BranchView) -> None:
        super().begin(slot, view)
        self._live[slot] = view.sampling.top_k
        self._plan()

    def end(self, slot: int) -> None:
        self._live.pop(slot, None)
        self._plan()

    def _plan(self) -> None:
        most = max(self._live.values(), default=1)
        self._width = min(1 << (max(most, 1) - 1).bit_length(), self._vocab_size)

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        k = value.long()
        values = logits.gather(1, largest(logits, self._width))
        least = values.gather(1, k.clamp(1, self._width) - 1)
        return (logits < least) & (k > 0)


class TopP(Truncation):
    """Keeps the smallest set of the likeliest tokens whose probability reaches ``top_p``, the last of them whole.

    Of equal logits at its border, those with the lowest ids are kept. 0 and 1 keep all.
    """

    FIELD, OFF = "top_p", 0.0
    examples = (
        Example(sampling={"decoder": "multinomial", "top_p": 0.7}),
        Example(sampling={"decoder": "multinomial", "top_p": 0.2}),
    )

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        on = (value > 0) & (value < 1)
        last = border(logits, torch.where(on, value, 2.0**-32))
        least = logits.gather(1, last)
        ids = torch.arange(logits.shape[1], device=logits.device)
        return ((logits < least) | ((logits == least) & (ids > last))) & on


class MinP(Truncation):
    """Drops the tokens whose probability is below ``min_p`` times that of the likeliest one.

    ``p_i < min_p · p_max`` is ``x_i < x_max + ln(min_p)``: no softmax is needed.
    """

    FIELD, OFF = "min_p", 0.0
    examples = (Example(sampling={"min_p": 0.1}), Example(sampling={"min_p": 0.6}))

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return logits < logits.amax(dim=1, keepdim=True) + value.log()


class TypicalP(Truncation):
    """Locally typical sampling (Meister and others 2023): keeps the tokens whose surprise is nearest to the entropy.

    Of these as many as are needed to reach a probability of ``typical_p``, and those that are equally near. The
    likeliest token may be dropped. 1 keeps all.
    """

    FIELD, OFF = "typical_p", 1.0
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"typical_p": 0.7}),)

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        on = value < 1
        surprise = -logits.log_softmax(dim=1)
        entropy = _entropy(surprise)
        nearness = -(surprise - entropy).abs()
        weights = masses(logits)
        target = part(torch.where(on, value, 2.0**-32), weights.sum(dim=1, keepdim=True))
        return (nearness < nearness.gather(1, crossing(nearness, weights, target))) & on


class EpsilonCutoff(Truncation):
    """Drops the tokens whose probability is below ``epsilon_cutoff`` (Hewitt and others 2022). 0 keeps all."""

    FIELD, OFF = "epsilon_cutoff", 0.0
    examples = (Example(sampling={"epsilon_cutoff": 0.02}),)

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _below(logits, value.log())


class EtaCutoff(Truncation):
    """Drops the tokens whose probability is below ``min(eta, √eta · e^−H)``, H the entropy (Hewitt and others 2022).

    ``eta_cutoff`` = 0 keeps all.
    """

    FIELD, OFF = "eta_cutoff", 0.0
    examples = (Example(sampling={"eta_cutoff": 0.02}),)

    def dropped(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        entropy = _entropy(-logits.log_softmax(dim=1))
        return _below(logits, torch.minimum(value.log(), 0.5 * value.log() - entropy))


def _entropy(surprise: torch.Tensor) -> torch.Tensor:
    """In nats, float32 ``[n, 1]``, of ``surprise = −ln p`` (float32 ``[n, vocab]``, inf where p is 0)."""
    # What is not possible must count as 0, not as 0 · inf.
    return (surprise.neg().exp() * surprise.clamp(max=-_LEAST)).sum(dim=1, keepdim=True)


def _below(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Where the probability is below ``e^log_p`` (float32 ``[n, 1]``), but for the likeliest token."""
    least = logits.logsumexp(dim=1, keepdim=True) + log_p
    return logits < torch.minimum(least, logits.amax(dim=1, keepdim=True))
