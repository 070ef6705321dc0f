"""What one call of the module needs to know about its rows, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trtllm_core.backends.torch.layer_cache import LayerCache
from trtllm_core.plugin.kv_policy import KVPlan


def host(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host; the same memory on the CPU."""
    return tensor.detach().cpu().numpy()


def is_decode(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a call is a step of one token a row, described on the host: what a graph can run."""
    lengths = inputs["query_lengths"]
    if not _is_plain(inputs) or lengths.shape[0] != inputs["input_ids"].shape[0] or not lengths.shape[0]:
        return False
    return bool((host(lengths) == 1).all())


def is_prompt(inputs: Mapping[str, torch.Tensor], longest: int) -> bool:
    """Whether a call is one whole prompt of up to ``longest`` tokens, whose last one alone is asked for."""
    ids, asked = inputs["input_ids"], inputs["logits_indices"]
    if not _is_plain(inputs) or ids.is_cuda or asked.is_cuda or not 1 < ids.shape[0] <= longest:
        return False
    one = inputs["query_lengths"].shape[0] == asked.shape[0] == 1
    return one and int(inputs["past_lengths"][0]) == 0 and int(asked[0]) == ids.shape[0] - 1


def _is_plain(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows are described on the host, and have neither adapters nor a prompt table."""
    if any(inputs[name].is_cuda for name in ("query_lengths", "past_lengths", "position_ids", "block_tables")):
        return False
    lora = inputs.get("lora_ids")
    return inputs.get("virtual_tokens") is None and (lora is None or not bool((host(lora) >= 0).any()))


def is_all(asked: torch.Tensor, tokens: int) -> bool:
    """Whether every token is asked for, in order: the common case of a decode step, which needs no gathering."""
    if asked.shape[0] != tokens or asked.device.type != "cpu":
        return False
    return bool((host(asked) == np.arange(tokens)).all())


@dataclass(frozen=True)
class Row:
    """One sequence of a call."""

    tokens: slice
    """Its tokens in the packed input."""
    past: int
    """Tokens that were in its cache before this call."""
    length: int
    """Tokens in its cache after this call; of a ring, tokens that it has seen."""
    blocks: np.ndarray
    """int32: the blocks that hold them, in order."""
    plan: KVPlan

    @property
    def queries(self) -> int:
        """Tokens of this call."""
        return self.length - self.past

    @property
    def wraps(self) -> bool:
        """Whether its cache is a ring that has overwritten something by the end of this call."""
        return self.plan.window is not None and self.length > self.plan.window

    def read(self, cache: LayerCache) -> torch.Tensor:
        """The row's part of a layer's cache, ``[length, 2 * kv_heads, d]``: a view where its blocks are neighbours.
        Of a ring, all of its entries, as they lie there."""
        if self._run is not None:
            return cache.read(self._run)
        return cache.blocks(self._blocks_on(cache.data.device))[: self._entries]

    def _blocks_on(self, device: torch.device) -> torch.Tensor:
        """The blocks as a tensor, sent once for all layers; nobody waits for it."""
        sent: torch.Tensor | None = self.__dict__.get("_sent")
        if sent is None:
            sent = self.__dict__["_sent"] = torch.from_numpy(self.blocks).to(device, non_blocking=True)
        return sent

    def read_past(self, cache: LayerCache) -> torch.Tensor:
        """Of a ring that wraps, before this call writes: what its queries see of the past, oldest first."""
        entry = self.plan.cache_index(self.seen_past)
        size = self.plan.tokens_per_block
        place = self.blocks[entry // size].astype(np.int64) * size + entry % size
        return cache.gather(torch.from_numpy(place).to(cache.data.device))

    @cached_property
    def seen_past(self) -> np.ndarray:
        """int64: numbers of the past tokens that the queries of a ring see, ascending: sinks and window of the first
        query, which include those of the others."""
        assert self.plan.window is not None
        sink = min(self.plan.sink, self.past)
        start = max(self.past - (self.plan.window - self.plan.sink) + 1, sink)
        return np.concatenate((np.arange(sink), np.arange(start, self.past)))

    @cached_property
    def _run(self) -> slice | None:
        if len(self.blocks) > 1 and (np.diff(self.blocks) != 1).any():
            return None
        start = int(self.blocks[0]) * self.plan.tokens_per_block
        return slice(start, start + self._entries)

    @property
    def _entries(self) -> int:
        return self.length if self.plan.window is None else min(self.length, self.plan.window)


class PackedBatch:
    """Rows of a packed, paged call, split into those that run one token and those that run several."""

    def __init__(self, inputs: Mapping[str, torch.Tensor], plan: KVPlan, device: torch.device) -> None:
        lengths = host(inputs["query_lengths"])
        past = host(inputs["past_lengths"])
        self.plan = plan
        self.tables = host(inputs["block_tables"])
        self.device = device
        self.tokens_per_block = size = plan.tokens_per_block
        ends = np.cumsum(lengths)
        self.after = after = past + lengths
        self.held = held = after if plan.window is None else np.minimum(after, plan.window)
        """Entries of each row's cache that hold something after this call."""
        self.rows = [
            Row(slice(int(e - n), int(e)), int(p), int(p + n), self.tables[i, : -(-int(h) // size)], plan)
            for i, (e, n, p, h) in enumerate(zip(ends, lengths, past, held, strict=True))
        ]
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        number = np.arange(len(row_of)) - np.repeat(ends - lengths - past, lengths)
        self.written: torch.Tensor | None = None
        """int64: the tokens of the packed input that are written; None: all. What a ring overwrites within a call is
        not."""
        if (after > held).any():
            assert plan.window is not None
            stays = (number < plan.sink) | (number >= (after - (plan.window - plan.sink))[row_of])
            if not stays.all():
                self.written = self.to_device(np.flatnonzero(stays))
                row_of, number = row_of[stays], number[stays]
        entry = plan.cache_index(number)
        self.write = self.to_device(self.tables[row_of, entry // size].astype(np.int64) * size + entry % size)
        """int64: where in the pool they are written."""
        self.single = lengths == 1

    def store(self, cache: LayerCache, kv: torch.Tensor) -> torch.Tensor:
        """Write keys and values of the call's tokens, ``[tokens, 2 * kv_heads, d]``, to a layer's cache; returns them
        as it keeps them."""
        return cache.write(self.write, kv, self.written)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    @cached_property
    def decode(self) -> PaddedRows | None:
        """The rows with one token, padded to the longest; None when there are fewer than two."""
        rows = np.flatnonzero(self.single)
        if len(rows) < 2:
            return None
        blocks = -(-int(self.held[rows].max()) // self.tokens_per_block)
        tables = np.maximum(self.tables[rows, :blocks], 0).astype(np.int64)
        starts = np.array([self.rows[i].tokens.start for i in rows])
        return PaddedRows(
            tokens=None if len(rows) == len(self.rows) else self.to_device(starts),
            blocks=self.to_device(tables.reshape(-1)),
            lengths=self.to_device(self.after[rows].astype(np.int64)),
            count=len(rows),
            entries=blocks * self.tokens_per_block,
            plan=self.plan,
        )

    @cached_property
    def ragged(self) -> list[Row]:
        """The rows that are attended one by one."""
        return (
            self.rows if self.decode is None else [r for r, one in zip(self.rows, self.single, strict=True) if not one]
        )


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Rows of one token each, whose caches are gathered to one length."""

    tokens: torch.Tensor | None
    """int64 ``[count]``: their tokens in the packed input; None: they are all of it, in order."""
    blocks: torch.Tensor
    """int64 ``[count * blocks]``."""
    lengths: torch.Tensor
    """int64 ``[count]``: as of ``Row``."""
    count: int
    entries: int
    plan: KVPlan

    def offsets(self) -> torch.Tensor:
        """int64 ``[count, entries]``: number of each entry's token, less that of the row's query. Beyond 0: none."""
        entry = torch.arange(self.entries, device=self.lengths.device)
        return token_numbers(entry, self.lengths[:, None], self.plan) - (self.lengths[:, None] - 1)

    def mask(self, window: int | None) -> torch.Tensor:
        """bool ``[count, 1, 1, entries]``: what each row's query sees."""
        offset = self.offsets()
        seen = offset <= 0
        if window is not None:
            seen &= offset > -window
        return seen[:, None, None]


def token_numbers(entry: torch.Tensor, length: torch.Tensor | int, plan: KVPlan) -> torch.Tensor:
    """Which token of a sequence of ``length`` each entry of its cache holds; ``length`` or more where none."""
    if plan.window is None:
        return entry
    size = plan.window - plan.sink
    last = length - 1  # the newest token that an entry of the ring holds: as many as one round before the last
    newest = last - (last - entry) % size
    newest = torch.where(entry < plan.window, newest, last + 1)
    wrapped = torch.as_tensor(last, device=entry.device) >= plan.window
    return torch.where(wrapped & (entry >= plan.sink), newest, entry)


def causal_mask(row: Row, window: int | None, device: torch.device) -> torch.Tensor:
    """bool ``[queries, length]``: query i stands at position ``past + i`` and sees up to itself."""
    position = torch.arange(row.past, row.length, device=device)[:, None]
    entry = torch.arange(row.length, device=device)
    seen = entry <= position
    if window is not None:
        seen &= entry > position - window
    return seen


def ring_mask(number: torch.Tensor, query: torch.Tensor, window: int | None, plan: KVPlan) -> torch.Tensor:
    """bool ``[queries, keys]``: what the tokens numbered ``query`` see of those numbered ``number`` in a ring.

    Its sinks and its window; of these, what a layer's own ``window`` lets them see.
    """
    assert plan.window is not None
    offset = number - query[:, None]
    seen = (offset <= 0) & ((number < plan.sink) | (offset > plan.sink - plan.window))
    if window is not None:
        seen &= offset > -window
    return seen
