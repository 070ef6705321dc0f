"""Results of a static batch, in the classic shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trtllm_core.decoding.request import Branch, Request
from trtllm_core.errors import ConfigError, listing


@dataclass(frozen=True)
class GenerationOutput:
    """One finished sequence."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Generated tokens, the one that ended it included."""
    length: int
    """Tokens of prompt and text: an end token is written, but not counted."""
    finish_reason: str
    seed: int
    """The seed that was used: repeat the request with it to get the same tokens."""
    text: str = ""
    log_probs: tuple[float, ...] = ()
    error: Exception | None = None
    matched: Any = None
    """The stop string or word that ended it, where one did."""
    cached_prompt_tokens: int = 0
    """Tokens of the prompt that were in the KV cache already: computing began after them."""
    plugin_seconds: dict[str, float] = field(default_factory=dict)
    """Host seconds that each of its plugins took for it. A call for several requests is shared equally by those that
    use the plugin then."""


def output_of(branch: Branch) -> GenerationOutput:
    """What a finished branch leaves."""
    assert branch.finish_reason is not None
    return GenerationOutput(
        prompt=tuple(branch.request.prompt),
        tokens=tuple(branch.generated),
        length=branch.length,
        finish_reason=branch.finish_reason,
        seed=branch.request.seed,
        text=branch.text,
        log_probs=tuple(branch.log_probs),
        error=branch.error,
        matched=None if branch.stop is None else branch.stop.matched,
        cached_prompt_tokens=branch.cached_prompt,
        plugin_seconds=branch.plugin_seconds,
    )


def check_ids_suffice(requests: Sequence[Request]) -> None:
    """Refuse what a tensor of token ids would drop.

    Raises:
        ConfigError: text, lengths or log-probabilities were asked for.
    """
    names = ("output_log_probs", "output_cum_log_probs", "output_sequence_lengths")
    asked = {name for request in requests for name in names if getattr(request.sampling, name)}
    asked |= {"text" for request in requests if request.text}
    if asked:
        raise ConfigError(f"{listing(asked)}: a tensor of token ids has no place for it; ask for return_dict=True")


class BatchIds:
    """``output_ids``, int32 ``[batch, 1, max_seq_len]``: filled with the padding token and written as tokens come."""

    def __init__(self, requests: Sequence[Request], end_ids: Sequence[int]) -> None:
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        self.ids = torch.zeros(len(requests), 1, longest, dtype=torch.int32)
        self.ends = [len(request.prompt) for request in requests]
        for row, request in zip(self.ids[:, 0], requests, strict=True):
            ends = end_ids if request.sampling.end_id is None else request.sampling.end_id
            pad = request.sampling.pad_id
            row.fill_((ends[0] if ends else 0) if pad is None else pad)
            row[: len(request.prompt)] = torch.tensor(request.prompt)

    def add(self, index: int, tokens: Sequence[int]) -> None:
        """Write the next tokens of a sequence."""
        end = self.ends[index]
        self.ids[index, 0, end : end + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.ends[index] = end + len(tokens)


def batch_result(
    requests: Sequence[Request], outputs: Sequence[GenerationOutput], end_ids: Sequence[int]
) -> torch.Tensor | dict[str, Any]:
    """The classic result: the ids, or a dictionary where any request says ``return_dict``."""
    batch = BatchIds(requests, end_ids)
    for i, output in enumerate(outputs):
        batch.add(i, output.tokens)
    if not any(r.sampling.return_dict for r in requests):
        return batch.ids
    result: dict[str, Any] = {
        "output_ids": batch.ids,
        "finish_reasons": [output.finish_reason for output in outputs],
        "outputs": list(outputs),
    }
    lengths = [output.length for output in outputs]
    return result | _asked_for(requests, batch.ids, lengths, [output.log_probs for output in outputs])


def partial_result(
    requests: Sequence[Request], branches: Mapping[str, Branch], ids: torch.Tensor
) -> torch.Tensor | dict[str, Any]:
    """The classic result of a batch that still runs: of each branch what there is so far.

    ``branches`` are those that have started, by request; ``ids`` is ``output_ids`` as it stands.
    """
    if not any(r.sampling.return_dict for r in requests):
        return ids
    started = [branches.get(request.request_id) for request in requests]
    lengths = [len(r.prompt) if b is None else b.length for r, b in zip(requests, started, strict=True)]
    chances = [() if branch is None else branch.log_probs for branch in started]
    return {"output_ids": ids} | _asked_for(requests, ids, lengths, chances)


def _asked_for(
    requests: Sequence[Request], ids: torch.Tensor, lengths: Sequence[int], chances: Sequence[Sequence[float]]
) -> dict[str, torch.Tensor]:
    """The entries that some request asked for: lengths of the sequences, log-probabilities of their new tokens."""
    result = {}
    if any(r.sampling.output_sequence_lengths for r in requests):
        result["sequence_lengths"] = torch.tensor([[length] for length in lengths], dtype=torch.int32)
    if any(r.sampling.output_cum_log_probs for r in requests):
        result["cum_log_probs"] = torch.tensor([[float(sum(each))] for each in chances])
    if any(r.sampling.output_log_probs for r in requests):
        result["log_probs"] = torch.zeros(ids.shape)
        for row, request, each in zip(result["log_probs"][:, 0], requests, chances, strict=True):
            start = len(request.prompt)
            row[start : start + len(each)] = torch.tensor(each)
    return result
