"""The text before a position, as device code sees it: committed tokens, and what is not committed yet behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trtllm_core.plugin.views import DecodingContext, LogitsBatch


def tokens_before(
    context: DecodingContext, slot: torch.Tensor, offset: torch.Tensor, count: int, extra: torch.Tensor | None = None
) -> torch.Tensor:
    """The tokens before some positions, the nearest first.

    Args:
        context: the slots' state.
        slot: int64 ``[n]``.
        offset: int64 ``[n, m]``: the positions, counted from the end of the slot's committed tokens.
        count: how many tokens to look back.
        extra: integers ``[n, k]``: tokens that follow the committed ones; None where all offsets are 0.

    Returns:
        Integers ``[n, m, count]``; -1 before the beginning of the text.
    """
    slot = slot.view(-1, 1, 1)
    length = context.lengths[slot]
    back = torch.arange(1, count + 1, device=slot.device)
    index = length + offset.unsqueeze(2) - back
    tokens = context.tokens[slot, index.clamp(0, context.max_seq_len - 1)]
    if extra is not None:
        ahead = index - length
        row = torch.arange(extra.shape[0], device=slot.device).view(-1, 1, 1)
        tokens = torch.where(ahead < 0, tokens, extra[row, ahead.clamp(0, extra.shape[1] - 1)])
    return torch.where(index < 0, -1, tokens)


def recent(batch: LogitsBatch, count: int) -> torch.Tensor:
    """The ``count`` tokens before each position of a step, the nearest first, drafts included: integers
    ``[n, count]``, -1 before the beginning of the text."""
    extra = None if batch.draft is None else batch.draft[batch.slot]
    return tokens_before(batch.context, batch.slot, batch.offset.unsqueeze(1), count, extra).squeeze(1)


def texts(batch: LogitsBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens before each position of a step, drafts included.

    Returns:
        int64 ``[n, max_seq_len]``, 0 from the end on, and the number of tokens, int64 ``[n]``.
    """
    context = batch.context
    length = context.lengths.index_select(0, batch.slot)
    end = length + batch.offset
    column = torch.arange(context.max_seq_len, device=length.device)
    tokens = context.tokens.index_select(0, batch.slot).long()
    if batch.draft is not None:
        ahead = column - length.unsqueeze(1)
        drafted = batch.draft[batch.slot].long().gather(1, ahead.clamp(0, batch.draft.shape[1] - 1))
        tokens = torch.where(ahead < 0, tokens, drafted)
    return tokens.masked_fill_(column >= end.unsqueeze(1), 0), end


def generated(batch: LogitsBatch) -> torch.Tensor:
    """How many tokens were generated before each position of a step, drafts included: int64 ``[n]``."""
    context = batch.context
    return (
        context.lengths.index_select(0, batch.slot) - context.prompt_lengths.index_select(0, batch.slot) + batch.offset
    )
