"""What a step does on the device after the engine: process the logits, choose, ask the criteria, and maybe commit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.choice import Choice
from trtllm_core.decoding.companions import CompanionLogits
from trtllm_core.decoding.positions import Positions
from trtllm_core.decoding.stages import CommittedRows
from trtllm_core.decoding.stopping import Asked


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step chose. Nothing has changed by it."""

    choice: Choice
    asked: Asked
    scores: torch.Tensor
    """To take log-probabilities from: float32 ``[n, vocab_size_padded]``."""


def choose(
    table: BranchTable,
    logits: torch.Tensor,
    at: Positions,
    companions: CompanionLogits | None = None,
    in_place: bool = False,
) -> Chosen:
    """Next tokens at the positions ``at`` from their raw logits, float32 ``[n, vocab_size_padded]``.

    ``companions`` and ``in_place`` are as of ``LogitsPipeline.apply``.
    """
    scored = table.wants_log_probs
    processed, scores = table.pipeline.apply(logits, at.slot, at.offset, at.draft, scored, companions, in_place)
    # A sampler may overwrite what it is given; who looks at it afterwards must find it as it was.
    wanted = processed if table.wants_logits else None
    looks = wanted is not None or (scored and scores is processed)
    choice = table.choosers.select(processed.clone() if looks else processed, at)
    return Chosen(choice, table.rules.ask(choice.selection, choice.slot, wanted, choice.source), scores)


def commit_ahead(table: BranchTable, chosen: Chosen) -> torch.Tensor:
    """Commit what was chosen, one token a row, on the device alone, before the host has seen it.

    What is no token, which the host will find out, is written as some token: the next step must be able to run on it.

    Returns:
        int32 ``[n]``: the tokens that were committed.
    """
    selection, slot = chosen.choice.selection, chosen.choice.slot
    tokens, newest = table.slots.commit_one(slot, selection.tokens, selection.counts)
    rows = CommittedRows(slot, tokens, selection.counts, chosen.asked.scores)
    for stages in table.stages:
        stages.commit_device(rows)
    return newest
