"""Which logits are the largest, and where their probabilities add up to a share: with as little sorting as possible.

Probabilities are counted in whole numbers here, so that a sum is the same in whatever order, width or batch it is
added up: one request's token never depends on how much of the vocabulary another's made the sampler look at.
"""

from __future__ import annotations

import math

import torch

from trtllm_core.decoding import kernels

_ONE = 2.0**32
"""Mass of the largest logit. Of a vocabulary of 2^20 tokens, the sum of all masses still fits into a float64."""

_ROUNDING = 1 - 2.0**-24

_DIGIT = 11  # bits that one pass of ``_radix`` looks at: three passes are a float32
_SHORT = 4096  # rows that are sorted at once
_FEW = (256, 4096)  # how many of the largest logits are tried before all of them are looked at


def masses(logits: torch.Tensor) -> torch.Tensor:
    """``exp(x − x_max)`` in units of 2^-32, rounded down: int64 ``[n, vocab]`` for float32 ``[n, vocab]``."""
    most = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # of a row of -inf, no NaN
    return logits.sub(most).exp_().mul_(_ONE).long()


def part(share: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``share`` (float32 ``[n, 1]`` in (0, 1]) of ``total`` (int64 ``[n, 1]``): int64 ``[n, 1]``, 1..total.

    Share and masses are rounded to 24 bits: what reaches the share but for so much has reached it.
    """
    return (share.double() * total.double() * _ROUNDING).ceil_().long().clamp_(min=1)


def reaches(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where running sums (``[n, m]``) first reach ``target`` (``[n, 1]``): int64 ``[n, 1]``, at most ``m - 1``."""
    place: torch.Tensor = torch.searchsorted(sums, target)
    return place.clamp_(max=sums.shape[1] - 1)


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
        runs = ids.gather(1, _unique(maxima, ids[:, : maxima.shape[1]]).topk(k, dim=1).indices)
        candidates = (runs.unsqueeze(2) * run + ids[0, :run]).flatten(1)
        ids = torch.cat([candidates, ids[:, whole:]], dim=1)
        logits = logits.gather(1, ids)
    return ids.gather(1, _unique(logits, ids).topk(k, dim=1).indices)


def border(logits: torch.Tensor, share: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The token at which the running sum of probabilities reaches ``share``, going from the largest logit down.

    Equal logits go by id. ``crossing`` of ``masses``; on a GPU with Triton, in kernels that do not sort.

    Args:
        logits: float32 ``[n, vocab]``.
        share: float32 ``[n, 1]`` in (0, 1].
        weights: ``masses(logits)``, if they are at hand.

    Returns:
        int64 ``[n, 1]``: ids.
    """
    if kernels.takes(logits) and logits.shape[1] >= _SHORT and logits.stride(1) == 1:
        from trtllm_core.decoding.kernels.nucleus import nucleus_border

        return nucleus_border(logits, share)
    weights = masses(logits) if weights is None else weights
    return crossing(logits, weights, part(share, weights.sum(dim=1, keepdim=True)))


def crossing(values: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The token at which a running sum of ``weights`` reaches ``target``, going from the largest value to the smallest.

    Equal values go by id. On the CPU, a few of the largest of a long row are tried first, which is nearly always
    enough, and then a radix search. On a GPU a look at the result would wait for the device, so that it sorts:
    ``border`` does without. The result is the same.

    Args:
        values: float32 ``[n, vocab]``.
        weights: int64 ``[n, vocab]``, >= 0.
        target: int64 ``[n, 1]``, from 1 to the row's sum of weights.

    Returns:
        int64 ``[n, 1]``: ids.
    """
    if not _on_host(values) or values.shape[1] < _SHORT:
        return _by_sorting(values, weights, target)
    tokens = torch.empty_like(target)
    left = torch.arange(len(values))
    for width in (few for few in _FEW if 4 * few <= values.shape[1]):
        ids = largest(values, width)
        sums = weights.gather(1, ids).cumsum(dim=1)
        tokens[left] = ids.gather(1, reaches(sums, target))
        short = (sums[:, -1:] < target).squeeze(1)
        if not short.any():
            return tokens
        left, values, weights, target = left[short], values[short], weights[short], target[short]
    tokens[left] = _radix(values, weights, target)
    return tokens


def _by_sorting(values: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    ids = values.sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, reaches(weights.gather(1, ids).cumsum(dim=1), target))


def _on_host(tensor: torch.Tensor) -> bool:
    """Whether a look at the numbers costs nothing."""
    return tensor.device.type == "cpu"


def _radix(values: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``crossing``, from the highest digit of the value to the lowest; of equal values the right one is counted off."""
    keys = _sortable(values).long().add_(2**31)
    value = torch.zeros_like(target)
    digits, counted = torch.empty_like(keys), torch.empty_like(weights)  # reused: fresh memory is dear
    for shift in range(2 * _DIGIT, -1, -_DIGIT):
        inside = torch.bitwise_right_shift(keys, shift + _DIGIT, out=digits) == value
        torch.mul(weights, inside, out=counted)
        torch.bitwise_right_shift(keys, shift, out=digits).bitwise_and_((1 << _DIGIT) - 1)
        by_digit = weights.new_zeros(len(values), 1 << _DIGIT).scatter_add_(1, digits, counted).flip(1)
        sums = by_digit.cumsum(dim=1)
        place = reaches(sums, target)
        target = target - (sums - by_digit).gather(1, place)
        value = (value << _DIGIT) + ((1 << _DIGIT) - 1 - place)
    return reaches(torch.mul(weights, keys == value, out=counted).cumsum_(dim=1), target)


def _sortable(values: torch.Tensor) -> torch.Tensor:
    """int32 that sort as ``values`` (float32) do; -0.0 is 0."""
    bits = values.contiguous().view(torch.int32)
    # A float's sign and magnitude as two's complement sorts as the float.
    return torch.where(bits < 0, -(2**31) - bits, bits)


def _unique(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort as ``values`` (float32) do, and where those are equal, from high to low ``ids``."""
    return (_sortable(values).long() << 32) - ids
