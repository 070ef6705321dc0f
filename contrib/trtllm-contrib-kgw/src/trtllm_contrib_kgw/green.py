"""Which tokens are green after which: the one thing that the watermark and its detector must agree about."""

from __future__ import annotations

import torch

from trtllm_core.device import draw_salt, uniform

SALT = draw_salt("kgw")
MAX_CONTEXT = 4
_PRIME = 0x100000001B3


def keys_of(secret: torch.Tensor, context: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """A key for each context.

    Args:
        secret: int64 ``[n]``.
        context: integers ``[n, MAX_CONTEXT]``, the nearest token first; -1 before the beginning of the text.
        width: int64 ``[n]``: how many of them count.

    Returns:
        int64 ``[n]``.
    """
    key = secret.clone()
    for back, token in enumerate(context.long().unbind(1)):
        key = torch.where(back < width, (key ^ (token + 1)) * _PRIME, key)  # FNV-1a; ``uniform`` mixes it well
    return key


def draws_of(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The number in (0, 1] of tokens (int64) after contexts; the two broadcast. A token is green up to gamma."""
    return uniform(keys, tokens, SALT)
