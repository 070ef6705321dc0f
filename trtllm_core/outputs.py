"""Results of a static batch, in the classic shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.decoding.telling import stacked
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
    """Of ``tokens``, where asked for."""
    top_log_probs: tuple[Mapping[int, float], ...] = ()
    """Beside each of ``tokens``, where asked for (``num_logprobs``): token to log-probability, the likeliest first."""
    context_logits: torch.Tensor | None = None
    """float32 ``[prompt, vocab_size_padded]``, before processors, where the engine gathers them."""
    generation_logits: torch.Tensor | None = None
    """float32 ``[tokens, vocab_size_padded]``: what each of ``tokens`` was chosen from, before processors, where the
    engine gathers it."""
    prompt_log_probs: tuple[float, ...] = ()
    """Of the prompt's tokens, where asked for (``prompt_logprobs``). The first is given, and virtual ones are no
    tokens: 0."""
    prompt_top_log_probs: tuple[Mapping[int, float], ...] = ()
    """Beside each of them, where asked for: token to log-probability, the likeliest first. Nothing beside the first."""
    error: Exception | None = None
    matched: Any = None
    """The stop string or word that ended it, where one did."""
    cached_prompt_tokens: int = 0
    """Tokens of the prompt that were in the KV cache already: computing began after them."""
    drafted_tokens: int = 0
    """Tokens that were run on trial, for all sequences of the request."""
    accepted_tokens: int = 0
    """Those of them that became text."""
    preemptions: int = 0
    """How often its request had to give its cache back, and to compute its text anew."""
    plugin_seconds: dict[str, float] = field(default_factory=dict)
    """Host seconds that each of its plugins took for its request. A call for several requests is shared equally by
    the branches that use the plugin then."""
    request_id: str = ""
    sequence: int = 0
    """Which of the sequences that its request returns; 0 is the best."""
    cum_log_prob: float = 0.0
    """Where log-probabilities were asked for, or a search ran: as the decoder counts."""
    score: float = 0.0
    """What a search ranked it by."""


def outputs_of(live: LiveRequest) -> list[GenerationOutput]:
    """What a request leaves that is over: its sequences, best first."""
    request = live.request
    prompt = tuple(request.prompt)
    scores, others = live.scores, request.sampling.prompt_logprobs
    if scores is not None and not scores.complete:  # it ended before its prompt was through
        scores = None
    return [
        GenerationOutput(
            prompt=prompt,
            tokens=tuple(one.tokens),
            length=len(prompt) + one.length,
            finish_reason=one.reason,
            seed=request.seed,
            text=one.text,
            log_probs=tuple(one.log_probs),
            top_log_probs=tuple(one.top_log_probs),
            context_logits=None if scores is None else scores.logits,
            generation_logits=stacked(one.logits),
            prompt_log_probs=() if scores is None or others is None else tuple(scores.log_probs),
            prompt_top_log_probs=() if scores is None or not others else tuple(scores.top_log_probs),
            error=live.error if one.reason == "plugin_error" else None,
            matched=None if one.stop is None else one.stop.matched,
            cached_prompt_tokens=live.cached_prompt,
            drafted_tokens=live.drafted,
            accepted_tokens=live.accepted,
            preemptions=live.preemptions,
            plugin_seconds=live.plugin_seconds,
            request_id=request.request_id,
            sequence=number,
            cum_log_prob=one.cum_log_prob,
            score=one.score,
        )
        for number, one in enumerate(live.sequences or ())
    ]


def check_ids_suffice(requests: Sequence[Request]) -> None:
    """Refuse what a tensor of token ids would drop.

    Raises:
        ConfigError: text, lengths or log-probabilities were asked for.
    """
    names = ("output_log_probs", "output_cum_log_probs", "output_sequence_lengths", "num_logprobs")
    asked = {name for request in requests for name in names if getattr(request.sampling, name)}
    asked |= {"prompt_logprobs" for request in requests if request.sampling.prompt_logprobs is not None}
    asked |= {"text" for request in requests if request.text}
    if asked:
        raise ConfigError(f"{listing(asked)}: a tensor of token ids has no place for it; ask for return_dict=True")


class BatchIds:
    """``output_ids``, int32 ``[batch, sequences, max_seq_len]``: filled with the padding token and written as tokens
    come. Where requests return different numbers of sequences, rows that are nobody's are padding."""

    def __init__(self, requests: Sequence[Request], widths: Sequence[int], end_ids: Sequence[int]) -> None:
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        self.ids = torch.zeros(len(requests), max(widths), longest, dtype=torch.int32)
        self._prompts = [len(request.prompt) for request in requests]
        self._ends = [[len(request.prompt)] * max(widths) for request in requests]
        self._pads = []
        for rows, request, width in zip(self.ids, requests, widths, strict=True):
            ends = end_ids if request.sampling.end_id is None else request.sampling.end_id
            pad = request.sampling.pad_id
            self._pads.append((ends[0] if ends else 0) if pad is None else pad)
            rows.fill_(self._pads[-1])
            rows[:width, : len(request.prompt)] = torch.tensor(request.prompt)

    def add(self, index: int, tokens: Sequence[int], sequence: int = 0, keep: int | None = None) -> None:
        """Write the next tokens of a sequence, after the first ``keep`` generated ones; None: after all."""
        ends, row = self._ends[index], self.ids[index, sequence]
        if keep is not None:
            row[self._prompts[index] + keep : ends[sequence]] = self._pads[index]
            ends[sequence] = self._prompts[index] + keep
        end = ends[sequence]
        row[end : end + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        ends[sequence] = end + len(tokens)

    def follow(self, delta: Delta) -> None:
        """Do what a delta says; its ``request_id`` is the index in the batch."""
        self.add(int(delta.request_id), delta.tokens, delta.sequence, delta.keep)


def batch_result(
    requests: Sequence[Request], outputs: Sequence[Sequence[GenerationOutput]], end_ids: Sequence[int]
) -> torch.Tensor | dict[str, Any]:
    """The classic result: the ids, or a dictionary where any request says ``return_dict``. ``outputs`` are those of
    each request."""
    batch = BatchIds(requests, list(map(len, outputs)), end_ids)
    every = [output for row in outputs for output in row]
    for i, row in enumerate(outputs):
        for output in row:
            batch.add(i, output.tokens, output.sequence)
    if not any(r.sampling.return_dict for r in requests):
        return batch.ids
    result: dict[str, Any] = {
        "output_ids": batch.ids,
        "finish_reasons": [output.finish_reason for output in every],
        "outputs": every,
    }
    numbers = [{o.sequence: (o.length, o.log_probs, o.cum_log_prob) for o in row} for row in outputs]
    if any(r.sampling.num_logprobs for r in requests):
        result["top_log_probs"] = [[output.top_log_probs for output in row] for row in outputs]
    return result | _asked_for(requests, batch.ids, numbers) | _logits(requests, outputs, batch.ids.shape[1])


def _logits(
    requests: Sequence[Request], outputs: Sequence[Sequence[GenerationOutput]], sequences: int
) -> dict[str, Any]:
    """Logits and the prompts' log-probabilities, of requests that have them: entries by request."""
    result: dict[str, Any] = {}
    first = [row[0] for row in outputs]
    if any(request.context_logits for request in requests):
        result["context_logits"] = [one.context_logits for one in first]
    if any(request.sampling.prompt_logprobs is not None for request in requests):
        result["prompt_log_probs"] = [torch.tensor(one.prompt_log_probs) for one in first]
    if any(request.sampling.prompt_logprobs for request in requests):
        result["prompt_top_log_probs"] = [one.prompt_top_log_probs for one in first]
    given = [(i, o.sequence, o.generation_logits) for i, row in enumerate(outputs) for o in row]
    logits = [(i, sequence, rows) for i, sequence, rows in given if rows is not None]
    if logits:
        longest, width = max(len(rows) for _, _, rows in logits), logits[0][2].shape[1]
        result["generation_logits"] = torch.zeros(len(outputs), sequences, longest, width)
        for i, sequence, rows in logits:
            result["generation_logits"][i, sequence, : len(rows)] = rows
    return result


def partial_results(
    requests: Sequence[Request],
    widths: Sequence[int],
    end_ids: Sequence[int],
    steps: Iterable[Sequence[Delta]],
    started: Mapping[str, LiveRequest],
) -> Iterator[torch.Tensor | dict[str, Any]]:
    """The classic result of a batch as it stands, after each step that added something.

    Args:
        requests: the batch.
        widths: how many sequences each of them returns.
        end_ids: of the session.
        steps: what each step told.
        started: the requests that have started, by id; filled as the steps go on.

    Raises:
        ConfigError: the ids alone cannot say what was asked for.
        PluginError: what a plugin raised first, once all sequences have ended.
    """
    if not any(request.sampling.return_dict for request in requests):
        check_ids_suffice(requests)
    batch = BatchIds(requests, widths, end_ids)
    errors = []
    for deltas in steps:
        for delta in deltas:
            batch.follow(delta)
            errors += [delta.error] if delta.error is not None else []
        if deltas:
            yield partial_result(requests, started, batch.ids.clone())
    if errors:
        raise errors[0]


def partial_result(
    requests: Sequence[Request], started: Mapping[str, LiveRequest], ids: torch.Tensor
) -> torch.Tensor | dict[str, Any]:
    """The classic result of a batch that still runs: of each sequence what there is so far.

    ``started`` are the requests that have started, by id; ``ids`` is ``output_ids`` as it stands.
    """
    if not any(r.sampling.return_dict for r in requests):
        return ids
    numbers: list[dict[int, _Numbers]] = []
    for request in requests:
        live, prompt = started.get(request.request_id), len(request.prompt)
        shown = {} if live is None else live.standing()
        numbers.append({i: (prompt + one.length, one.log_probs, one.cum_log_prob) for i, one in shown.items()})
        if live is None:
            numbers[-1][0] = prompt, (), 0.0
    result: dict[str, Any] = {"output_ids": ids} | _asked_for(requests, ids, numbers)
    given = [None if (live := started.get(request.request_id)) is None else live.scores for request in requests]
    scores = [one if one is not None and one.complete else None for one in given]
    if any(request.context_logits for request in requests):
        result["context_logits"] = [None if one is None else one.logits for one in scores]
    if any(request.sampling.prompt_logprobs is not None for request in requests):
        result["prompt_log_probs"] = [None if one is None else torch.tensor(one.log_probs) for one in scores]
    return result


_Numbers = tuple[int, Sequence[float], float]
"""Length, log-probabilities and their sum."""


def _asked_for(
    requests: Sequence[Request], ids: torch.Tensor, numbers: Sequence[Mapping[int, _Numbers]]
) -> dict[str, torch.Tensor]:
    """The entries that some request asked for: lengths of the sequences, log-probabilities of their new tokens.

    ``numbers`` are by request and sequence.
    """
    wanted = {
        "sequence_lengths": ("output_sequence_lengths", ids.shape[:2], torch.int32),
        "cum_log_probs": ("output_cum_log_probs", ids.shape[:2], torch.float32),
        "log_probs": ("output_log_probs", ids.shape, torch.float32),
    }
    result = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (field_name, shape, dtype) in wanted.items()
        if any(getattr(r.sampling, field_name) for r in requests)
    }
    for i, (request, row) in enumerate(zip(requests, numbers, strict=True)):
        for sequence, (length, log_probs, total) in row.items():
            start = len(request.prompt)
            if "sequence_lengths" in result:
                result["sequence_lengths"][i, sequence] = length
            if "cum_log_probs" in result:
                result["cum_log_probs"][i, sequence] = total
            if "log_probs" in result:
                result["log_probs"][i, sequence, start : start + len(log_probs)] = torch.tensor(log_probs)
    return result
