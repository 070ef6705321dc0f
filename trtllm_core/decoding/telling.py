"""What a step tells of a request: tokens and text that are new, revisions of a search, and how its sequences ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Delta
from trtllm_core.plugin import Hypothesis, Stop


def append(
    branch: Branch,
    tokens: Sequence[int],
    chances: Sequence[float],
    text: str,
    reason: str | None,
    beside: Sequence[Mapping[int, float]] = (),
) -> Delta:
    """What a branch told that goes on by itself. ``chances`` are its new log-probabilities, ``beside`` those of the
    likeliest tokens at its new ones."""
    live = branch.owner
    error = live.error if reason == "plugin_error" else None
    if live.scores is None and not (chances or beside or branch.logits):  # nearly all of them
        return Delta(live.request.request_id, tuple(tokens), text, reason, (), error, branch.number)
    return Delta(
        live.request.request_id,
        tuple(tokens),
        text,
        reason,
        tuple(chances),
        error,
        branch.number,
        top_log_probs=tuple(beside),
        generation_logits=stacked(branch.logits[len(branch.logits) - len(tokens) :]) if branch.logits else None,
        **_of_prompt(live, branch.number),
    )


def show(branch: Branch, tokens: Sequence[int], text: str) -> Delta:
    """What one of several ranked branches tells: ``tokens`` and ``text`` are new; others may have changed before."""
    live, number = branch.owner, branch.number
    shown = live.shown.get(number)
    live.shown[number] = branch, len(branch.generated), len(branch.text)
    start = len(branch.generated) - len(tokens)
    if shown is None and start:  # of a search whose width grows: nothing was told of what is there
        shown = Branch(live, -1, number), 0, 0
    if shown is None or shown[0] is branch:
        return append(branch, tokens, branch.log_probs[start:], text, None, branch.likeliest[start:])
    return _revision(live, shown, number, branch.hypothesis(""))


def ends(live: LiveRequest) -> list[Delta]:
    """The last deltas of a request whose branches are ranked: its sequences as the user gets them, best first."""
    deltas = []
    for number, one in enumerate(live.sequences or ()):
        shown = live.shown.get(number) or (Branch(live, -1, number), 0, 0)
        delta = _revision(live, shown, number, one)
        error = live.error if one.reason == "plugin_error" else None
        deltas.append(replace(delta, finish_reason=one.reason, error=error))
    return deltas


def _revision(
    live: LiveRequest,
    shown: tuple[Branch, int, int],
    number: int,
    one: Hypothesis,
) -> Delta:
    """From what was shown to what is. Where that only grew, it is told as growth."""
    branch, count, length = shown
    # What is told beside tokens may differ where they do not: by groups, one of which pays for what the other took.
    before = _beside(branch.generated[:count], branch.log_probs)
    kept, kept_text = _common(before, _beside(one.tokens, one.log_probs)), _common(branch.text[:length], one.text)
    grew = kept == count and kept_text == length
    return Delta(
        live.request.request_id,
        tuple(one.tokens[kept:]),
        one.text[kept_text:],
        log_probs=tuple(one.log_probs[kept:]),
        top_log_probs=tuple(one.top_log_probs[kept:]),
        sequence=number,
        keep=None if grew else kept,
        keep_text=0 if grew else kept_text,
        generation_logits=stacked(one.logits[kept:]) if one.logits else None,
        **_of_prompt(live, number),
    )


def _of_prompt(live: LiveRequest, sequence: int) -> dict[str, Any]:
    """What the first delta of a request says of its prompt."""
    scores = live.scores
    if scores is None or scores.told or sequence or not scores.complete:
        return {}
    scores.told = True
    told: dict[str, Any] = {"context_logits": scores.logits}
    if live.request.sampling.prompt_logprobs is not None:
        told["prompt_log_probs"] = tuple(scores.log_probs)
    if live.request.sampling.prompt_logprobs:
        told["prompt_top_log_probs"] = tuple(scores.top_log_probs)
    return told


def stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Logits of tokens as ``[tokens, vocab_size_padded]``; None where there are none."""
    return torch.stack(list(rows)) if rows else None


def _beside(tokens: Sequence[int], log_probs: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(tokens, log_probs or [0.0] * len(tokens), strict=False))


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def finished(
    parent: Branch,
    token: int,
    log_prob: float,
    cum: float,
    stop: Stop | None,
    score: float,
    raw: Sequence[torch.Tensor] = (),
    beside: Mapping[int, float] | None = None,
) -> Hypothesis:
    """What a candidate of a search leaves that is complete with ``token``."""
    branch = parent.copy_to(parent.slot, parent.number)
    branch.generated.append(token)
    if branch.owner.plan.log_probs:
        branch.log_probs.append(log_prob)
    if beside is not None:
        branch.likeliest.append(beside)
    branch.logits += raw
    branch.score, branch.rank = cum, score
    branch.say_last([token], stop)
    return branch.hypothesis("search" if stop is None else stop.reason, stop)


def as_they_stand(live: LiveRequest, reason: str) -> tuple[Hypothesis, ...]:
    """The sequences of a request that ends around its branches, through a failure or the user."""
    still = [branch.hypothesis(reason) for branch in (*live.running, *live.unborn)]
    if live.plan.ranked:
        returns = live.plan.branching.returns
        # A search that had not begun is one branch. Its other sequences are empty, as those of a request in the queue.
        empty = (Hypothesis((), reason=reason, branch=n) for n in range(len(still) + len(live.hypotheses), returns))
        return (*still, *live.hypotheses, *empty)[:returns]
    return tuple(sorted((*still, *live.hypotheses), key=lambda one: one.branch))
