"""Choosing tokens: each row by the decoder that its request asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from trtllm_core.decoding.samplers import log_probs
from trtllm_core.decoding.stages import Stages
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import Decoder, DecodingContext, LogitsBatch, Sampler, Selection
from trtllm_core.plugin.decoder import DecoderCapabilities
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.plugin.views import BranchView, CommitBatch

INTEGERS = (torch.int64, torch.int32)


class SamplingDecoder(Decoder):
    """A sampler as a decoder: one branch, one token a step."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.capabilities: DecoderCapabilities = sampler.capabilities  # type: ignore[misc]

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as all that follows."""
        self._ones = torch.ones(context.slots, dtype=torch.int64, device=context.device)
        self.sampler.setup(context)

    def begin(self, slot: int, view: BranchView) -> None:
        self.sampler.begin(slot, view)

    def commit(self, batch: CommitBatch) -> None:
        self.sampler.commit(batch)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.sampler.fork(src, dst)

    def rewind(self, slot: int, n: int) -> None:
        self.sampler.rewind(slot, n)

    def end(self, slot: int) -> None:
        self.sampler.end(slot)

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        """See ``Decoder``."""
        tokens = self.sampler.sample(logits, batch)
        if not isinstance(tokens, torch.Tensor) or tokens.shape != batch.slot.shape:
            raise PluginContractError(f"sampler returned {tokens!r}, not one token for each of {len(batch.slot)} rows")
        return Selection(tokens.unsqueeze(1), self._ones[: len(tokens)])


def _wrap(plugin: SlotPlugin) -> Decoder:
    if isinstance(plugin, Sampler):
        return SamplingDecoder(plugin)
    assert isinstance(plugin, Decoder)
    return plugin


class Choosers(Stages[Decoder]):
    """The decoders of a session. Nearly always there is one, and then nothing is merged."""

    def __init__(self, context: DecodingContext) -> None:
        super().__init__(context, _wrap)

    def select(self, logits: torch.Tensor, slot: torch.Tensor, offset: torch.Tensor) -> Selection:
        """Tokens for processed ``logits`` (float32 ``[n, vocab_size_padded]``, which may be overwritten).

        Rows whose decoder failed get no token.
        """
        alone = len(self.live) == 1
        parts = []
        for stage in self.live:
            batch = LogitsBatch(self.context, slot, offset, stage.flags[slot])
            try:
                chosen = stage.call(stage.plugin.select, logits if alone else logits.clone(), batch)
                parts.append((batch.active, _checked(stage.name, chosen, slot)))
            except PluginError as error:
                self._fail(stage, error)
        if not parts:
            nothing = torch.zeros_like(slot)
            return Selection(nothing.unsqueeze(1), nothing)
        return parts[0][1] if alone else _merge(parts, logits)


def _checked(name: str, selection: Selection, slot: torch.Tensor) -> Selection:
    if not isinstance(selection, Selection):
        raise PluginContractError(f"decoder {name!r} returned a {type(selection).__name__}, not a Selection")
    tokens, counts = selection.tokens, selection.counts
    for what, tensor, dtypes in (("tokens", tokens, INTEGERS), ("counts", counts, INTEGERS), *_chances(selection)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes or tensor.device != slot.device:
            raise PluginContractError(
                f"decoder {name!r} returned {_described(tensor)} as {what}, where {dtypes[0]} on {slot.device} is due"
            )
    wide = tokens.dim() == 2 and len(tokens) == len(slot) and tokens.shape[1] > 0
    if not wide or counts.shape != slot.shape:
        raise PluginContractError(
            f"decoder {name!r} returned tokens {list(tokens.shape)} and counts {list(counts.shape)} for "
            f"{len(slot)} rows"
        )
    if selection.log_probs is not None and selection.log_probs.shape != tokens.shape:
        raise PluginContractError(f"decoder {name!r} returned log_probs of another shape than its tokens")
    if selection.parents or selection.spawn or selection.kill or selection.revised:
        raise PluginContractError(f"decoder {name!r} wants to branch, which this session's loop does not do")
    if tokens.dtype == counts.dtype == torch.int64:
        return selection
    return replace(selection, tokens=tokens.long(), counts=counts.long())


def _chances(selection: Selection) -> Sequence[tuple[str, object, tuple[torch.dtype, ...]]]:
    return () if selection.log_probs is None else (("log_probs", selection.log_probs, (torch.float32,)),)


def _described(thing: object) -> str:
    if not isinstance(thing, torch.Tensor):
        return f"a {type(thing).__name__}"
    return f"{thing.dtype} {list(thing.shape)} on {thing.device}"


def _merge(parts: Sequence[tuple[torch.Tensor, Selection]], logits: torch.Tensor) -> Selection:
    width = max(selection.tokens.shape[1] for _, selection in parts)
    tokens = parts[0][1].tokens.new_zeros(parts[0][1].tokens.shape[0], width)
    counts = torch.zeros_like(parts[0][1].counts)
    for active, selection in parts:
        padded = torch.nn.functional.pad(selection.tokens, (0, width - selection.tokens.shape[1]))
        tokens = torch.where(active[:, None], padded, tokens)
        counts = torch.where(active, selection.counts, counts)
    if all(selection.log_probs is None for _, selection in parts):
        return Selection(tokens, counts)
    # What a decoder says of its own tokens stands; for the others it is what the loop would have computed.
    chances = log_probs(logits, tokens)
    for active, selection in parts:
        if selection.log_probs is not None:
            given = torch.nn.functional.pad(selection.log_probs, (0, width - selection.log_probs.shape[1]))
            chances = torch.where(active[:, None], given, chances)
    return Selection(tokens, counts, chances)
