"""The two static methods of the C++ ``GptDecoder`` that accept drafts. Their tensors are written in place, as there.

A draft is accepted by its id where it is the token that the target model took. By logits the classic signature names no
drafts, so that the old kernel held the whole distributions against each other: a draft is refused where any token v has
``p(v) < t·q(v)``, with a number t drawn for each v. With ``draft_token_ids`` it is the drafted token alone that counts,
as in the papers, and the text is distributed as the target model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import torch

from trtllm_core.decoding.verifying import leading, likely, remainder
from trtllm_core.errors import ConfigError


class FinishedState(IntFlag):
    """Why a sequence is not decoded further: what the tensors of finished states hold."""

    EMPTY = 0
    FINISHED_EOS = 1
    FINISHED_STOP_WORDS = 2
    FINISHED_MAX_LENGTH = 4
    SKIP_DECODING = 8
    """The place lies behind a refused draft."""


FINISHED = FinishedState.FINISHED_EOS | FinishedState.FINISHED_STOP_WORDS | FinishedState.FINISHED_MAX_LENGTH


def accept_draft_tokens_by_ids(
    target_token_ids: torch.Tensor,
    draft_token_ids: torch.Tensor,
    context_lengths: torch.Tensor,
    num_draft_tokens: torch.Tensor,
    sequence_lengths: torch.Tensor,
    finished_vec: torch.Tensor,
    finished_final: torch.Tensor,
    finished_sum: torch.Tensor | None = None,
    batch_slots: torch.Tensor | None = None,
) -> None:
    """Cut sequences behind the first draft that is not what the target model took in its place.

    Args:
        target_token_ids: integers ``[slots, max_seq_len]``: texts with all that was taken, one more than drafts.
        draft_token_ids: integers ``[slots, max_draft_tokens]``.
        context_lengths: integers ``[slots]``: where the drafts begin.
        num_draft_tokens: integers ``[slots]``.
        sequence_lengths: integers ``[slots]``: of the texts; cut in place.
        finished_vec: ``FinishedState`` ``[max_draft_tokens + 1, slots]``: behind so many drafts.
        finished_final: ``FinishedState`` ``[slots]``, written: behind those that are accepted.
        finished_sum: integers ``[slots]``, written: whether that means the end; None: not wanted.
        batch_slots: int ``[batch]``: which slots; None: all.
    """
    slots = _slots(batch_slots, len(draft_token_ids), draft_token_ids.device)
    start, length = context_lengths[slots].long(), sequence_lengths[slots].long()
    counts = torch.minimum(num_draft_tokens[slots].long(), length - start).clamp_(min=0)
    place = start.unsqueeze(1) + torch.arange(draft_token_ids.shape[1], device=slots.device)
    taken = target_token_ids[slots].gather(1, place.clamp_(max=target_token_ids.shape[1] - 1))
    accepted = leading(taken == draft_token_ids[slots], counts)
    cut = torch.where(accepted < counts, start + accepted + 1, length)
    sequence_lengths[slots] = cut.clamp_(max=target_token_ids.shape[1]).to(sequence_lengths.dtype)
    finished_final[slots] = finished_vec[accepted, slots].to(finished_final.dtype)
    if finished_sum is not None:
        finished_sum[slots] = ((finished_final[slots].int() & int(FINISHED)) > 0).to(finished_sum.dtype)


def accept_draft_tokens_by_logits(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor | Sequence[torch.Tensor],
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    num_draft_tokens: torch.Tensor,
    finished: torch.Tensor,
    batch_slots: torch.Tensor | None,
    vocab_size: int,
    vocab_size_padded: int,
    use_random_accept_threshold: bool,
    random_accept_threshold: float,
    generator: torch.Generator | None = None,
    *,
    draft_token_ids: torch.Tensor | None = None,
) -> None:
    """Mark what lies behind refused drafts, and make of the logits at the first of them what a token in its place is to
    be sampled from: the logarithms of ``max(0, p − q)``, normalised.

    Args:
        draft_logits: floats ``[slots, max_draft_tokens, vocab_size_padded]``.
        target_logits: of each entry of the batch floats ``[max_draft_tokens + 1, vocab_size_padded]``, written.
        draft_probs: floats like ``draft_logits``, written: q.
        target_probs: the same: p, and at the first refused draft ``max(0, p − q)``.
        num_draft_tokens: integers ``[slots]``.
        finished: ``FinishedState`` ``[max_draft_tokens + 1, slots]``, written: what to skip.
        batch_slots: int ``[batch]``: the slot of each entry; None: its number.
        vocab_size, vocab_size_padded: columns from ``vocab_size`` on have no probability.
        use_random_accept_threshold: draw t uniformly; else it is ``random_accept_threshold``.
        generator: what draws it, on the device of the logits; it stands for ``curandState``.
        draft_token_ids: integers ``[slots, max_draft_tokens]``: see the module.

    Raises:
        ConfigError: logits of another width.
    """
    given = list(target_logits)
    slots = _slots(batch_slots, len(given), draft_logits.device)
    most = draft_logits.shape[1]
    if any(each.shape[1] != vocab_size_padded for each in (draft_logits.flatten(0, 1), *given)):
        raise ConfigError(f"logits are not vocab_size_padded = {vocab_size_padded} wide")
    p, q = (_chances(rows, vocab_size) for rows in (torch.stack([each[:most] for each in given]), draft_logits[slots]))
    draft_probs[slots], target_probs[slots] = q.to(draft_probs.dtype), p.to(target_probs.dtype)
    if draft_token_ids is not None:
        drafts = draft_token_ids[slots].long().clamp(0, vocab_size - 1).unsqueeze(2)  # padding may be anything
        p_of, q_of = p.gather(2, drafts), q.gather(2, drafts)
    else:
        p_of, q_of = p[:, :, :vocab_size], q[:, :, :vocab_size]
    least = torch.full_like(p_of, random_accept_threshold)
    if use_random_accept_threshold:
        # torch draws from [0, 1): of what is left to 1, none is 0.
        least = 1 - torch.rand(p_of.shape, generator=generator, device=p_of.device)
    right = likely(p_of, q_of, least) if draft_token_ids is not None else p_of >= least * q_of
    counts = num_draft_tokens[slots].long()
    accepted = leading(right.all(dim=2), counts)
    place = torch.arange(most + 1, device=slots.device).unsqueeze(1)
    skipped = torch.where(place > accepted, int(FinishedState.SKIP_DECODING), int(FinishedState.EMPTY))
    finished[:, slots] = torch.where(place <= counts, skipped.to(finished.dtype), finished[:, slots])
    for entry in (accepted < counts).nonzero().flatten().tolist():
        at, logits = int(accepted[entry]), given[entry]
        rest = remainder(p[entry, at : at + 1], q[entry, at : at + 1])[0]
        target_probs[slots[entry], at] = rest.to(target_probs.dtype)
        logits[at] = (rest / rest.sum()).log().clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)


def _chances(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float32 probabilities of logits ``[…, vocab_size_padded]``: 0 from ``vocab_size`` on."""
    wide = logits.float()
    if vocab_size < wide.shape[-1]:
        wide = wide.clone()
        wide[..., vocab_size:] = -torch.inf
    return wide.softmax(-1)


def _slots(batch_slots: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device) if batch_slots is None else batch_slots.to(device, torch.int64)
