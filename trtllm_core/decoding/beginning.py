"""How branches begin: everything that is kept by slot learns of them, and those that share a prompt follow it."""

from __future__ import annotations

import numpy as np

from trtllm_core.decoding.ahead import needs_host
from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.companions import Beside
from trtllm_core.decoding.detokenizer import TextStream
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.random import slot_key
from trtllm_core.errors import PluginError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import BranchView


def begin(table: BranchTable, live: LiveRequest) -> None:
    """Everything that is kept by slot learns of the branches. A plugin that fails ends the request at once.

    Raises:
        ConfigError: a plugin refuses what the request asks of it. ``BranchTable.release`` its slots then.
    """
    request, plan = live.request, live.plan
    end_ids = table.end_ids if request.sampling.end_id is None else request.sampling.end_id
    if needs_host(plan, request):
        table.waiting.update(live.slots)
    for number, slot in enumerate(live.slots):
        table.owners[slot] = live
        if plan.positions > 1:
            table.verifying.add(slot)
        if request.text:
            table.streams.add(slot)
        if plan.log_probs:
            table.scored.add(slot)
        table.slots.begin(slot, request.prompt, slot_key(request.seed, number), live.most)
        table.conditions.begin(slot, request)
        table.gathering.begin(slot, request, None if number else live.scores)
        if number < plan.branching.branches:
            stream = TextStream(table.token_bytes) if request.text and table.token_bytes is not None else None
            live.unborn.append(Branch(live, slot, number, stream=stream))
    for slot, prompt in live.companions.items():
        table.owners[slot] = live
        table.slots.begin(slot, prompt, 0, live.most + len(prompt) - len(request.prompt))
        table.conditions.begin(slot, request)
    table.companions.begin(live.slots, tuple(live.companions), plan.companions)
    first = live.unborn.pop(0)
    live.running.append(first)
    table.live[first.slot] = first
    if live.unborn:
        table.unborn[first.slot] = live
    try:
        for number, slot in enumerate(live.slots):
            view = BranchView(request.request_id, number, slot, request.prompt, request.sampling, end_ids, request.seed)
            table.pipeline.begin(plan.processors, view)
            if plan.sampler is not None:
                table.samplers.begin((plan.sampler,), view)
            table.choosers.begin((plan.decoder,), view)
            table.rules.begin(plan.criteria, view)
    except PluginError as error:
        live.error = error


def born(table: BranchTable, slots: list[int], cache: KVCache, beside: Beside | None = None) -> list[int]:
    """Prompts are through: the other branches of their requests begin, and share the prompt's cache.

    They were begun like the first, so that nothing but the cache is forked. The slots that begin are appended to
    ``slots``, and their companions to those ``beside``.

    Returns:
        For each of them, the place in ``slots`` of the branch whose logits are theirs, too.
    """
    rows: list[int] = []
    src, dst = [], []
    for row, slot in enumerate(tuple(slots)):
        live = table.unborn.pop(slot, None)
        if live is None:
            continue
        for branch in live.unborn:
            table.live[branch.slot] = branch
            src.append(slot)
            dst.append(branch.slot)
            rows.append(row)
        live.running += live.unborn
        live.unborn = []
    if dst:
        sources, copies = table.companions.with_pairs(src, dst)
        cache.fork(np.array(sources), np.array(copies))
        if beside is not None:
            own = len(dst)
            beside.rows.update((b, beside.rows[a]) for a, b in zip(sources[own:], copies[own:], strict=True))
        slots += dst
    return rows
