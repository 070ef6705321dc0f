"""What plugins are shown: small frozen views, never objects of the core.

``n`` is the number of positions in this step that ask for a token, ``slots`` the engine's number of slots. State is
kept by slot, never by row: a row is only a position in this step's batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from trtllm_core.config import SamplingConfig

FinishReason = str
"""``end_id``, ``stop_words``, ``stop_string``, ``length``, ``search`` (a search let it be), ``plugin_error``,
``cancelled``, or a plugin's own."""


@dataclass(frozen=True, slots=True)
class BranchView:
    """One live sequence of a request, as it begins."""

    request_id: str
    branch: int
    """Number of the branch within its request; 0 is the one that the user asked for."""
    slot: int
    """Stable index at which all state of the branch lives, until ``end``."""
    prompt: Sequence[int]
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    seed: int
    params: Any = None
    """The plugin's own parameters, validated by its ``Params``; None where it declares none."""


@dataclass(frozen=True, slots=True)
class DecodingContext:
    """The slots' state on the device. Plugins read these tensors and change none of them."""

    slots: int
    max_seq_len: int
    vocab_size: int
    vocab_size_padded: int
    device: torch.device
    tokens: torch.Tensor
    """int32 ``[slots, max_seq_len]``: prompt and committed tokens; undefined from ``lengths`` on."""
    lengths: torch.Tensor
    """int64 ``[slots]``: prompt and committed tokens of each slot."""
    prompt_lengths: torch.Tensor
    """int64 ``[slots]``."""
    seeds: torch.Tensor
    """int64 ``[slots]``: the key of the slot's random numbers, made of the request's seed and the branch."""
    text: Any = None
    """``Callable[[Sequence[int]], bytes]`` that detokenises, where the engine has a tokenizer; else None.

    Token by token: ``text(a + b) == text(a) + text(b)``. Special tokens have no text."""
    vocabulary: Sequence[bytes] | None = None
    """The bytes of each token, by id, where the engine has a tokenizer: what a grammar is held against.

    Special tokens have none. It may be shorter than ``vocab_size``, where a model has ids without a token."""
    encode: Callable[[str], Sequence[int]] | None = None
    """The tokens that the tokenizer makes of a text, with nothing around it; None where the engine has none."""
    clock: Callable[[], float] = time.monotonic
    """Seconds since some moment: rank 0's, on all ranks. Where an engine has several it is a collective, so all ranks
    must call it alike; a criterion reads it once a step."""


@dataclass(frozen=True, slots=True)
class LogitsBatch:
    """The positions that ask for a token in this step. All tensors are on ``context.device``."""

    context: DecodingContext
    slot: torch.Tensor
    """int64 ``[n]``."""
    offset: torch.Tensor
    """int64 ``[n]``: 0 in ordinary decode; position within the draft (0..k) in a verify step."""
    active: torch.Tensor
    """bool ``[n]``: the position's request asked for this plugin. Others must be left as they are."""
    draft: torch.Tensor | None = None
    """int32 ``[slots, k]``: tokens proposed but not committed; None outside a verify step."""
    starts: torch.Tensor | None = None
    """int64 ``[rows]``: the first position of each branch in a verify step, in which the positions of a branch follow
    each other: one more than it has drafts. None: each position is a branch."""
    companion_logits: torch.Tensor | None = None
    """float32 ``[m, vocab_size_padded]``: what the engine gave the step's companions, which no processor has changed.
    Read-only. None for a processor that has no companions in this step, as where none of its requests asks for a
    token in it."""
    companions: torch.Tensor | None = None
    """int64 ``[n, c]``, with ``companion_logits``: for each position the rows of this processor's companions there, in
    the order of ``LogitsProcessor.companions``. -1 where a position has fewer, or is not active."""


@dataclass(frozen=True, slots=True)
class CommitBatch:
    """The tokens that this step chose, before (``check``) or while (``commit``) they become history.

    In ``check``, ``context.lengths`` does not count them yet. In ``commit`` it does.
    """

    context: DecodingContext
    slot: torch.Tensor
    """int64 ``[n]``."""
    tokens: torch.Tensor
    """int64 ``[n, k]``; entries from ``counts`` on are undefined."""
    counts: torch.Tensor
    """int64 ``[n]``: how many of the k tokens are accepted, 0..k."""
    active: torch.Tensor
    """bool ``[n]``."""
    logits: torch.Tensor | None = None
    """float32 ``[m, vocab_size_padded]``: the step's processed logits, as the decoder was given them, for a plugin
    whose ``needs`` hold ``logits``; None for all others. Read-only."""
    source: torch.Tensor | None = None
    """int64 ``[n, k]``: for each of ``tokens``, the row of ``logits`` that it was chosen from. Given with ``logits``;
    entries from ``counts`` on are rows too, of no meaning."""
