"""How branches and requests end: what is told of it, and what the user gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Delta
from trtllm_core.decoding.telling import append, as_they_stand, ends
from trtllm_core.errors import PluginError
from trtllm_core.plugin import Hypothesis, Stop


def leave(table: BranchTable, branch: Branch, reason: str, stop: Stop | None) -> None:
    """A branch has ended, its request maybe not."""
    live = branch.owner
    live.hypotheses.append(branch.hypothesis(reason, stop))
    live.running.remove(branch)
    del table.live[branch.slot]
    table.left += (branch.slot, *table.companions.of.get(branch.slot, ()))


def end(table: BranchTable, live: LiveRequest, reason: str | None, told: Collection[int] = ()) -> list[Delta]:
    """A request is over.

    Args:
        live: the request.
        reason: why, where it ends around branches that have not ended.
        told: slots of branches whose end was told.
    """
    table.left += [slot for slot in table.slots_of(live) if slot not in table.left]
    ranked, deltas = live.plan.ranked, []
    if live.over:  # in a step that failed afterwards
        return []
    for branch in (*live.running, *live.unborn):
        if branch.slot not in told:
            text = branch.say_last((), None)
            deltas += [] if ranked else [append(branch, (), (), text, reason)]
    around = reason is not None and bool(live.running or live.unborn)
    live.sequences = as_they_stand(live, reason or "") if around else _finalize(table, live)
    if ranked:
        deltas += ends(live)
    live.running, live.unborn = [], []
    return deltas


def _finalize(table: BranchTable, live: LiveRequest) -> tuple[Hypothesis, ...]:
    """What the user gets of a request whose branches have all ended."""
    if not live.plan.ranked:
        return tuple(sorted(live.hypotheses, key=lambda one: one.branch))
    try:
        return table.choosers.finalize(live)
    except PluginError as error:
        live.error = error
        failed = tuple(replace(one, reason="plugin_error") for one in live.hypotheses)
        return failed[: live.plan.branching.returns]
