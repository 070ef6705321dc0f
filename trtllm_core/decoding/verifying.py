"""Which drafts are accepted: those that are what the sampler takes, or those that are likely enough.

The rule for likely ones is speculative sampling (Leviathan, Kalman, Matias 2023, appendix A; Chen and others 2023):
with p what the token should be distributed as, and q what the draft v was drawn from, v is accepted with probability
``min(1, p(v) / q(v))``, and the first that is not is replaced by a draw from ``max(0, p − q)``, normalised. Then the
token is distributed as p. A fixed threshold in place of the random number makes another distribution.
"""

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
    column = torch.arange(batch.draft.shape[1] + 1, device=tokens.device)
    place = (batch.starts.unsqueeze(1) + column).clamp_(max=len(tokens) - 1)
    taken = tokens[place]
    drafts = batch.draft[batch.slot[batch.starts]].long()
    return Selection(taken, leading(taken[:, :-1] == drafts, positions_of(batch) - 1) + 1)


def positions_of(batch: LogitsBatch) -> torch.Tensor:
    """int64 ``[rows]``: how many positions each branch of a verify step has."""
    assert batch.starts is not None
    return torch.diff(batch.starts, append=batch.starts.new_tensor([len(batch.slot)]))


def leading(right: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many drafts of each row are accepted: the first ones, up to one that is not right.

    Args:
        right: bool ``[rows, k]``.
        counts: int64 ``[rows]``: how many of the k there are, 0..k.

    Returns:
        int64 ``[rows]``, 0..counts.
    """
    there = torch.arange(right.shape[1], device=right.device) < counts.unsqueeze(1)
    return (right & there).long().cumprod(dim=1).sum(dim=1)


def likely(p: torch.Tensor, q: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Whether drafts are likely enough: ``p / q >= least``; what has no chance in either is not.

    Args:
        p: float32: the chance that each draft should have.
        q: of the same shape: the chance that it had when it was drawn.
        least: of a shape that fits: random numbers in (0, 1], or a threshold.

    Returns:
        bool, of that shape.
    """
    return (p >= least * q) & ((p > 0) | (q > 0))


def remainder(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What the token in place of a refused draft is drawn from: ``max(0, p − q)``, and p where nothing is left.

    Args:
        p, q: float32 ``[rows, vocab]``; q is 0 in rows that refused none.

    Returns:
        float32 ``[rows, vocab]``, not normalised.
    """
    left = (p - q).clamp_(min=0)
    return torch.where(left.sum(dim=1, keepdim=True) > 0, left, p)


def verified(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor, least: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The accepted drafts of each row, and behind them a draw: from p where all were, else from what p has more than q.

    Args:
        p: float32 ``[rows, k + 1, vocab]``: the distribution at each draft, and behind the last.
        q: float32 ``[rows, k, vocab]``: what each draft was drawn from.
        drafts: int64 ``[rows, k]``.
        counts: int64 ``[rows]``: how many of the k there are; what stands behind them is not looked at.
        least: float32 ``[rows, k]``: see ``likely``.
        u: float32 ``[rows, k + 1]`` in (0, 1]: what a draw at each place would take.

    Returns:
        int64 ``[rows, k + 1]`` tokens, and int64 ``[rows]`` how many of them count: 1..k + 1.
    """
    row, place = torch.arange(len(p), device=p.device), torch.arange(drafts.shape[1], device=p.device)
    there = row.unsqueeze(1), place, drafts.clamp(0, p.shape[2] - 1)  # what stands behind the counts may be anything
    accepted = leading(likely(p[there], q[there], least), counts)
    here = p[row, accepted]
    if drafts.shape[1]:
        refused = q[row, accepted.clamp(max=drafts.shape[1] - 1)]
        here = remainder(here, torch.where((accepted < counts).unsqueeze(1), refused, torch.zeros_like(refused)))
    token = draw_from(here, u[row, accepted])
    return torch.nn.functional.pad(drafts, (0, 1)).scatter_(1, accepted.unsqueeze(1), token.unsqueeze(1)), accepted + 1


def draw_from(chances: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """int64 ``[n]``: a token of each row of ``chances`` (float32 ``[n, vocab]``, not all 0), ``u`` in (0, 1]."""
    sums = chances.double().cumsum(dim=1)
    place: torch.Tensor = torch.searchsorted(sums, u.double().unsqueeze(1) * sums[:, -1:])
    # Rounding may leave a place beyond the last token that can be.
    last = (chances.shape[1] - 1) - (chances.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(place.squeeze(1), last)
