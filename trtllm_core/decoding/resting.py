"""Room for what decoders run in resting slots, beside what a step runs itself: found before the step, like its own."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import Decoder


def with_resting(
    table: BranchTable, cache: KVCache, slots: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slots, and for how many more tokens each must have room: those of a step, and behind them resting ones, in which
    its decoders say that tokens are going to run. A decoder that fails fails its requests, and has nothing run.

    Args:
        table: whose decoders are asked.
        cache: that the step runs on.
        slots: int64 ``[n]``: of the step.
        counts: int64 ``[n]``: how many tokens each of them is going to run.
    """
    looking = [stage for stage in table.choosers.live if type(stage.plugin).looks is not Decoder.looks]
    if not looking:
        return slots, counts
    choosing = slots[cache.cached[slots] + counts >= table.slots.lengths[slots]].tolist()
    more: dict[int, int] = {}
    for stage in looking:
        mine = [slot for slot in choosing if slot in stage.members]
        if not mine:
            continue
        try:
            wanted = stage.call(stage.plugin.looks, mine)
            _check(stage.name, wanted, stage.members, table)
        except PluginError as error:
            table.choosers.fail(stage, error)
        else:
            more |= wanted
    resting, total = np.array([*more], np.int64), np.array([*more.values()], np.int64)
    lacking = total - cache.cached[resting]
    short = lacking > 0
    return np.append(slots, resting[short]), np.append(counts, lacking[short])


def _check(name: str, wanted: object, members: Collection[int], table: BranchTable) -> None:
    if not isinstance(wanted, dict) or any(slot not in members or slot in table.live for slot in wanted):
        raise PluginContractError(f"decoder {name!r} returned {wanted!r} from looks, not tokens by resting slot")
