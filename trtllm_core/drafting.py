"""Drafts without an engine: which of them are accepted, on plain tensors, by the rules that sessions follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtllm_core.decoding.draft_model import DraftModel
from trtllm_core.decoding.random import slot_key, uniform
from trtllm_core.decoding.samplers import possible
from trtllm_core.decoding.verifying import leading, verified
from trtllm_core.errors import ConfigError


def accept_equal_drafts(taken: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens of each row stand where a draft is accepted if it is the token that was taken in its place.

    So the text is the one without drafts, however the tokens were taken.

    Args:
        taken: ``[rows, k + 1]``, of any integer dtype: what a sampler takes at each draft, and behind the last.
        drafts: ``[rows, k]``, of any integer dtype.
        counts: ``[rows]``: how many of the k a row has; None: all.

    Returns:
        int64 ``[rows]``: of ``taken`` so many are the row's next tokens, 1..k + 1.

    Raises:
        ConfigError: the shapes do not fit.
    """
    counts = _checked(taken.shape, drafts, counts)
    return leading(taken[:, :-1].long() == drafts.long(), counts) + 1


def accept_likely_drafts(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    draft_logits: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    positions: torch.Tensor,
    seeds: int | Sequence[int] = 0,
    threshold: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens of rows whose drafts were drawn from ``softmax(draft_logits)``, where each token should be one of
    ``softmax(logits)``: speculative sampling, as the decoder ``draft_model`` does it.

    Whatever shapes the distributions, such as a temperature, has been done to the logits.

    Args:
        logits: ``[rows, k + 1, vocab]``, of any floating dtype: at each draft, and behind the last.
        drafts: ``[rows, k]``, of any integer dtype.
        draft_logits: ``[rows, k, vocab]``.
        counts: ``[rows]``: how many of the k a row has; None: all.
        positions: int64 ``[rows]``: how many tokens the text has before the drafts. Random numbers depend on it, and on
            the seed: with those of a request, the tokens are those that a session takes.
        seeds: of all rows, or one for each.
        threshold: of all rows, or float ``[rows]``: a draft is accepted where its probability over that which it was
            drawn with reaches it, which changes the distribution. None: with that ratio as the probability.

    Returns:
        int64 ``[rows, k + 1]`` tokens, and int64 ``[rows]`` how many of them are the row's next ones. One is -1 where
        its logits forbid every token.

    Raises:
        ConfigError: the shapes do not fit.
    """
    counts = _checked(logits.shape[:2], drafts, counts)
    rows, k = drafts.shape
    each = [seeds] * rows if isinstance(seeds, int) else list(seeds)
    shapes = draft_logits.shape == (rows, k, logits.shape[2]) and positions.shape == (rows,) and len(each) == rows
    if threshold is not None and torch.as_tensor(threshold).numel() not in (1, rows):
        raise ConfigError(f"{torch.as_tensor(threshold).numel()} thresholds do not fit to {rows} rows")
    if not shapes:
        raise ConfigError(
            f"draft_logits {list(draft_logits.shape)}, positions {list(positions.shape)} and {len(each)} seeds do not "
            f"fit to logits {list(logits.shape)}"
        )
    device = logits.device
    keys = torch.tensor([slot_key(seed, 0) for seed in each], device=device).repeat_interleave(k + 1)
    places = (positions.to(device).unsqueeze(1) + torch.arange(k + 1, device=device)).flatten()
    chance, draw = (uniform(keys, places, salt).view(rows, k + 1) for salt in (DraftModel.ACCEPT, DraftModel.DRAW))
    least = chance[:, :-1]
    if threshold is not None:
        least = torch.as_tensor(threshold, dtype=torch.float32, device=device).reshape(-1, 1).expand(rows, k)
    wide, drafted = logits.float(), drafts.to(device, torch.int64)
    tokens, sizes = verified(wide.softmax(2), draft_logits.float().softmax(2), drafted, counts, least, draw)
    end = (sizes - 1).unsqueeze(1)
    behind = wide[torch.arange(rows, device=device), sizes - 1]
    return tokens.scatter(1, end, possible(behind, tokens.gather(1, end).squeeze(1)).unsqueeze(1)), sizes


def _checked(shape: Sequence[int], drafts: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """``counts`` as int64 ``[rows]``, clamped to 0..k; ``shape`` is that of what drafts are held against."""
    rows, k = drafts.shape if drafts.dim() == 2 else (0, 0)
    if drafts.dim() != 2 or tuple(shape) != (rows, k + 1) or (counts is not None and counts.shape != (rows,)):
        counted = "none" if counts is None else list(counts.shape)
        raise ConfigError(
            f"drafts {list(drafts.shape)} with counts {counted} do not fit to {list(shape)}: [rows, k + 1]"
        )
    if counts is None:
        return torch.full((rows,), k, dtype=torch.int64, device=drafts.device)
    return counts.to(drafts.device, torch.int64).clamp(0, k)
