"""What runs through the model beside a branch's last token: drafts of decoders, and tokens that a processor forces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.host import HostProcessorAdapter
from trtllm_core.decoding.stages import Stage
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import Decoder, LogitsBatch, Proposal


def propose(table: BranchTable, slots: Sequence[int]) -> None:
    """Fill ``table.drafts`` for branches in ``slots``, all of which generate. What is forced goes before what is
    guessed. A decoder that fails fails its requests; it proposes nothing."""
    table.drafts.clear()
    able = [slot for slot in slots if slot in table.verifying]
    if not able:
        return
    for stage in table.choosers.live:
        mine = [slot for slot in able if slot in stage.members]
        if mine and type(stage.plugin).propose is not Decoder.propose:
            try:
                for slot, tokens in zip(mine, _asked(table, stage, mine), strict=True):
                    _put(table, slot, tokens)
            except PluginError as error:
                table.choosers.fail(stage, error)
    for processor in table.pipeline.live:
        adapter = processor.plugin
        if isinstance(adapter, HostProcessorAdapter) and adapter.forces:
            for slot in able:
                if slot in processor.members:
                    try:
                        forced = processor.call(adapter.forced, slot)
                    except PluginError as error:
                        table.pipeline.fail(processor, error)
                        break
                    if forced:
                        _put(table, slot, list(forced))


def _put(table: BranchTable, slot: int, tokens: list[int]) -> None:
    """As many of the tokens as the request may verify and still has room for."""
    live = table.owners[slot]
    room = min(live.plan.positions - 1, live.most - int(table.slots.lengths[slot]) - 1)
    if tokens[: max(room, 0)]:
        table.drafts.put(slot, tokens[:room])


def _asked(table: BranchTable, stage: Stage[Decoder], slots: list[int]) -> list[list[int]]:
    context = table.slots.context
    slot = torch.tensor(slots, device=context.device)
    batch = LogitsBatch(context, slot, torch.zeros_like(slot), torch.ones_like(slot, dtype=torch.bool))
    proposal = stage.call(stage.plugin.propose, batch)
    if proposal is None:
        return [[] for _ in slots]
    if not isinstance(proposal, Proposal):
        raise PluginContractError(f"decoder {stage.name!r} returned a {type(proposal).__name__} from propose")
    tokens, counts = proposal.tokens, proposal.counts
    if tokens.dim() != 2 or len(tokens) != len(slots) or counts.shape != slot.shape:
        raise PluginContractError(
            f"decoder {stage.name!r} proposed tokens {list(tokens.shape)} and counts {list(counts.shape)} for "
            f"{len(slots)} rows"
        )
    width, vocab = tokens.shape[1], context.vocab_size
    rows = torch.cat([tokens, counts.unsqueeze(1)], 1).long().tolist()  # one transfer
    for *draft, count in rows:
        if not 0 <= count <= width or any(not 0 <= token < vocab for token in draft[:count]):
            raise PluginContractError(
                f"decoder {stage.name!r} proposed {count} of {width} tokens, {draft}, for a vocabulary of {vocab}"
            )
    return [row[: row[-1]] for row in rows]
