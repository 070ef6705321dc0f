"""Accepting drafts that are what the sampler takes: the tokens are those of a run without drafts, one by one."""

from __future__ import annotations

import torch

from trtllm_core.errors import PluginContractError
from trtllm_core.plugin import LogitsBatch, Selection


def checked_tokens(tokens: object, batch: LogitsBatch) -> torch.Tensor:
    """What a sampler returned: one token for each position.

    Raises:
        PluginContractError: it is something else.
    """
    if not isinstance(tokens, torch.Tensor) or tokens.shape != batch.slot.shape:
        raise PluginContractError(f"sampler returned {tokens!r}, not one token for each of {len(batch.slot)} rows")
    return tokens


def accept_equal(tokens: torch.Tensor, batch: LogitsBatch) -> Selection:
    """Of each branch the drafts that equal what was taken at their positions, up to the first that does not, and the
    token that was taken there.

    Args:
        tokens: int64 ``[n]``: what the sampler takes at each position.
        batch: of a verify step.
    """
    assert batch.draft is not None
    assert batch.starts is not None
    sizes = positions_of(batch)
    width = batch.draft.shape[1] + 1
    column = torch.arange(width, device=tokens.device)
    place = (batch.starts.unsqueeze(1) + column).clamp_(max=len(tokens) - 1)
    taken = tokens[place]
    drafts = batch.draft[batch.slot[batch.starts]].long()
    right = (taken[:, :-1] == drafts) & (column[:-1] < sizes.unsqueeze(1) - 1)
    return Selection(taken, right.long().cumprod(dim=1).sum(dim=1) + 1)


def positions_of(batch: LogitsBatch) -> torch.Tensor:
    """int64 ``[rows]``: how many positions each branch of a verify step has."""
    assert batch.starts is not None
    return torch.diff(batch.starts, append=batch.starts.new_tensor([len(batch.slot)]))
