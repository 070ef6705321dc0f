"""How requests get slots and room in the cache, give it back for others, and get it again: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm_core.decoding.beginning import begin
from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.gathering import PromptScores
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Request
from trtllm_core.kv_cache.cache import KVCache


def admit(table: BranchTable, request: Request, cache: KVCache, plan: Plan | None = None) -> LiveRequest | None:
    """See ``StepLoop.admit``: slots and cache for all branches that it may have, and for their companions."""
    others = table.pipeline.beside(request.sampling.preset)
    if plan is None or not {item.key for item in others} <= {item.key for item in plan.processors}:
        plan = table.plan(request, others)
    count = plan.branching.max_branches
    beside = [prompt for one in plan.companions for prompt in one.prompts]
    if table.slots.free < count * (1 + len(beside)):
        return None
    slots = tuple(table.slots.take() for _ in range(count * (1 + len(beside))))
    companions = dict(zip(slots[count:], beside * count, strict=True))
    leading = (slots[0], *slots[count : count + len(beside)])
    admitted: list[int] = []
    hits: list[int] = []
    live = None
    try:
        sampling = request.sampling
        for slot in slots:
            # The first runs the prompt, and the others become copies of it: they need as much room, and no prompt.
            own = companions.get(slot, request.prompt)
            prompt = own if slot in leading else ()
            new = len(own) - len(prompt) + sampling.max_new_tokens
            admission = cache.admit(slot, prompt, new, request.reuse_key, sampling.cache_priority)
            if admission is None:
                break
            admitted.append(slot)
            hits.append(admission.hit_length)
        else:
            context = table.slots.context
            scores = PromptScores.of(request, context.vocab_size, context.vocab_size_padded)
            most = min(len(request.prompt) + sampling.max_new_tokens, context.max_seq_len)
            live = LiveRequest(request, plan, slots[:count], most, scores, hits[0], companions)
            begin(table, live)
    except BaseException:
        _give_back(table, slots, admitted, cache)
        raise
    if live is None:
        _give_back(table, slots, admitted, cache)
    return live


def put_off(table: BranchTable, live: LiveRequest, cache: KVCache) -> None:
    """See ``StepLoop.preempt``."""
    slots = np.array(table.slots_of(live))
    assert (table.slots.ahead[slots] < 2).all(), "two steps are under way: land the first"
    live.put_off = True
    live.preemptions += 1
    cache.release(slots, keep=True)


def take_up(table: BranchTable, live: LiveRequest, cache: KVCache) -> bool:
    """See ``StepLoop.resume``: room for all of its branches, or for none."""
    request, slots = live.request, table.slots_of(live)
    first = live.running[0].slot
    leading = (first, *table.companions.of.get(first, ()))
    admitted: list[int] = []
    try:
        for slot in sorted(slots, key=lambda slot: slot not in leading):
            # Of several branches one asks for what is still kept; the others compute what they have, or rest.
            text = table.slots.history(slot) if slot in leading else []
            new = len(live.companions.get(slot, request.prompt)) + request.sampling.max_new_tokens - len(text)
            if cache.admit(slot, text, new, request.reuse_key, request.sampling.cache_priority) is None:
                break
            admitted.append(slot)
    finally:
        if admitted and len(admitted) < len(slots):
            cache.release(np.array(admitted))
    live.put_off = len(admitted) < len(slots)
    return not live.put_off


def _give_back(table: BranchTable, slots: Sequence[int], admitted: Sequence[int], cache: KVCache) -> None:
    table.release(slots)
    if admitted:
        cache.release(np.array(admitted))
