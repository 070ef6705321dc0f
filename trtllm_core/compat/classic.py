"""Callbacks of the classic signature, ``(step, input_ids, scores)`` over the whole batch, as plugins.

The classic runtime called them in lockstep, with one row for each beam of each request, finished ones included. They
may keep what they know by row and count on steps that rise by one, so that is what they are given here: rows stand at
``request * width + branch`` whoever else is in the batch, and requests that are at different steps (a prompt that
waited for room) come in calls of their own. The adapters are of the device kind, as they need all rows at once; but the
host waits for the device in each step, as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trtllm_core.errors import ConfigError, PluginContractError, listing
from trtllm_core.plugin import (
    BranchView,
    CommitBatch,
    DecodingContext,
    DeviceLogitsProcessor,
    DeviceStoppingCriterion,
    HostLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    StoppingCapabilities,
)

Processor = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(step, input_ids [rows, length] int32, scores [rows, vocab_size_padded] float32) → scores``."""

Criterion = Callable[[int, torch.Tensor, torch.Tensor], bool]
"""The same arguments, the new tokens among ``input_ids``; True ends the whole batch."""


class Rows:
    """The tensors that classic callbacks are given, and the row of each slot.

    Args:
        count: rows: requests times beams.
        width: branches that a request may have at once: its beams, or its answers.
        length: columns of ``input_ids``; None is the engine's longest sequence.
    """

    def __init__(self, count: int, width: int = 1, length: int | None = None) -> None:
        self.count, self.width, self.length = count, width, length
        self.of: dict[int, int] = {}
        """Slot to row, of live branches."""
        self.ids: torch.Tensor
        """int32 ``[count, length]``: prompt and tokens, and the end token after them."""
        self.scores: torch.Tensor
        """float32 ``[count, vocab_size_padded]``: rows that are not in a step keep what they were given last."""
        self._ends: dict[int, tuple[int, int]] = {}  # slot: lengths of its prompt and of the whole

    def setup(self, context: DecodingContext) -> None:
        """Allocate the tensors."""
        length = self.length or context.max_seq_len
        self.ids = torch.zeros(self.count, length, dtype=torch.int32, device=context.device)
        self.scores = torch.zeros(self.count, context.vocab_size_padded, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts.

        Raises:
            ConfigError: it is none of the rows that there are.
        """
        row = int(view.request_id) * self.width + view.branch if view.request_id.isdecimal() else self.count
        if view.branch >= self.width or row >= self.count:
            raise ConfigError(
                f"branch {view.branch} of request {view.request_id!r} has no place among {self.count} rows, "
                f"{self.width} a request: classic callbacks serve one static batch of a known size"
            )
        self.of[slot] = row
        self._ends[slot] = (len(view.prompt), len(view.prompt))
        self.ids[row] = view.end_ids[0] if view.end_ids else view.sampling.pad_id or 0
        self.ids[row, : len(view.prompt)] = torch.tensor(view.prompt, dtype=torch.int32)

    def commit(self, batch: CommitBatch) -> None:
        """Tokens were accepted."""
        for slot, tokens in _new_tokens(batch):
            prompt, end = self._ends[slot]
            self.ids[self.of[slot], end : end + len(tokens)] = tokens.int()
            self._ends[slot] = (prompt, end + len(tokens))

    def foreseen(self, batch: CommitBatch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``ids`` and scores in a check, the new tokens among them.

        A request that searches has its candidates there, best first, as many as it has rows.
        """
        ids, new = self.ids.clone(), list(_new_tokens(batch))
        source = list(range(self.count))
        requests: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for slot, tokens in new:
            requests.setdefault(self.of[slot] // self.width, []).append((slot, tokens))
        for request, rows in requests.items():
            searched = len({slot for slot, _ in rows}) < len(rows)
            for number, (slot, tokens) in enumerate(rows[: self.width]):
                row = request * self.width + number if searched else self.of[slot]
                source[row] = self.of[slot]
                ids[row] = self.ids[source[row]]
                end = self._ends[slot][1]
                ids[row, end : end + len(tokens)] = tokens.int()
        return ids, scores if source == list(range(self.count)) else scores[source]

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """See ``SlotPlugin``."""
        pairs = list(zip(src.tolist(), dst.tolist(), strict=True))
        sources, targets = ([self.of[pair[side]] for pair in pairs] for side in range(2))
        self.ids[targets], self.scores[targets] = self.ids[sources], self.scores[sources]
        self._ends |= {target: self._ends[source] for source, target in pairs}

    def end(self, slot: int) -> None:
        """A branch is over; its row stays as it is."""
        self.of.pop(slot, None)
        self._ends.pop(slot, None)

    def by_step(self, slots: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Positions of ``slots`` that have generated as many tokens, by that number: nearly always one group."""
        groups: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            prompt, end = self._ends[slot]
            groups.setdefault(end - prompt, []).append(i)
        yield from sorted(groups.items())


class ClassicLogitsProcessor(DeviceLogitsProcessor):
    """Runs a classic ``LogitsProcessor``: on raw logits, before everything else, as the classic loop did.

    Args:
        function: what is called; None only keeps ids and scores for a criterion.
        rows: of this call of ``generate``.
    """

    before = ("embedding_bias",)
    capabilities = LogitsCapabilities()

    def __init__(self, function: Processor | None, rows: Rows) -> None:
        self.function = function
        self.rows = rows

    def setup(self, context: DecodingContext) -> None:
        self.rows.setup(context)

    def begin(self, slot: int, view: BranchView) -> None:
        self.rows.begin(slot, view)

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        active = batch.active.nonzero().squeeze(1)
        slots = batch.slot[active].tolist()
        for step, group in self.rows.by_step(slots):
            places = active[group]
            rows = [self.rows.of[slots[i]] for i in group]
            self.rows.scores[rows] = logits[places]
            if self.function is not None:
                self.rows.scores = self._call(step)
                logits[places] = self.rows.scores[rows]

    def commit(self, batch: CommitBatch) -> None:
        self.rows.commit(batch)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.rows.fork(src, dst)

    def end(self, slot: int) -> None:
        self.rows.end(slot)

    def _call(self, step: int) -> torch.Tensor:
        assert self.function is not None
        given = self.rows.scores
        result = self.function(step, self.rows.ids.clone(), given)
        if not isinstance(result, torch.Tensor) or result.shape != given.shape:
            what = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise PluginContractError(
                f"{type(self.function).__name__} returned {what}, where scores {list(given.shape)} were given: a "
                "classic logits processor returns the scores"
            )
        return result.to(given)


class ClassicStoppingCriterion(DeviceStoppingCriterion):
    """Runs a classic ``StoppingCriteria``: after tokens were chosen, on the scores as the logits processor left them.

    Args:
        function: what is called.
        rows: of this call of ``generate``; not those of ``processor``.
        processor: used by the same requests; its scores are shown.
    """

    reason = "stopping_criteria"
    capabilities = StoppingCapabilities(speculation="none")

    def __init__(self, function: Criterion, rows: Rows, processor: ClassicLogitsProcessor) -> None:
        self.function = function
        self.rows = rows
        self.processor = processor
        self.stopped = False
        """True ends the whole batch: requests that start later end with their first token."""

    def setup(self, context: DecodingContext) -> None:
        self.rows.setup(context)

    def begin(self, slot: int, view: BranchView) -> None:
        self.rows.begin(slot, view)

    def check(self, batch: CommitBatch) -> torch.Tensor:
        ids, scores = self.rows.foreseen(batch, self.processor.rows.scores)
        for step, _ in self.rows.by_step(batch.slot[batch.active].tolist()):
            self.stopped = self.stopped or bool(self.function(step, ids, scores))
        return torch.full_like(batch.slot, 0 if self.stopped else -1)

    def commit(self, batch: CommitBatch) -> None:
        self.rows.commit(batch)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.rows.fork(src, dst)

    def end(self, slot: int) -> None:
        self.rows.end(slot)


def classic_plugins(
    processor: Processor | None, criterion: Criterion | None, requests: int, width: int = 1, length: int | None = None
) -> tuple[list[ClassicLogitsProcessor], list[ClassicStoppingCriterion]]:
    """Plugins for one call of ``generate`` with ``requests`` prompts, of at most ``width`` branches each: pass it both
    lists."""
    if processor is None and criterion is None:
        return [], []
    runs = ClassicLogitsProcessor(processor, Rows(requests * width, width, length))
    if criterion is None:
        return [runs], []
    return [runs], [ClassicStoppingCriterion(criterion, Rows(requests * width, width, length), runs)]


PostProcessor = Callable[[int, torch.Tensor, list[list[int]], int, int | None], None]
"""``(request id, logits [1, 1, vocab_size_padded], [token ids], stream, client id)``; changes the logits in place."""


class LogitsPostProcessors(HostLogitsProcessor):
    """Runs executor-era logits post-processors, which requests choose by name.

    Each branch is a call of its own, with its own tokens. (The executor called once for all beams of a request, on
    logits that it indexed by request: only one of the beams was right.)

    Args:
        functions: by name.
        names: for each request of the batch, the name of its post-processor or None.
    """

    capabilities = LogitsCapabilities()

    def __init__(self, functions: Mapping[str, PostProcessor], names: Sequence[str | None]) -> None:
        unknown = {name for name in names if name is not None} - functions.keys()
        if unknown:
            raise ConfigError(f"no logits processor {listing(unknown)} in logits_processor_map ({listing(functions)})")
        self.functions = functions
        self.names = names

    def start(self, view: BranchView) -> Any:
        """Number of the request, and its function."""
        number = int(view.request_id)
        name = self.names[number]
        return number, None if name is None else self.functions[name]

    def process(self, state: Any, tokens: Sequence[int], logits: torch.Tensor) -> None:
        number, function = state
        if function is not None:
            stream = torch.cuda.current_stream().cuda_stream if logits.is_cuda else 0
            function(number, logits.view(1, 1, -1), [list(tokens)], stream, None)

    def copy(self, state: Any) -> Any:
        return state


def _new_tokens(batch: CommitBatch) -> Iterator[tuple[int, torch.Tensor]]:
    """Slot and accepted tokens of each active row."""
    rows = zip(batch.active.tolist(), batch.slot.tolist(), batch.counts.tolist(), batch.tokens, strict=True)
    for active, slot, count, tokens in rows:
        if active:
            yield slot, tokens[:count]
