"""What a request asks for by its fields: a greedy choice, and processors that would change nothing."""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.order import PRESETS
from trtllm_core.decoding.plan import PlanItem


def asks_greedy(sampling: SamplingConfig) -> bool:
    """Whether its fields, unless a decoder is named, ask for the likeliest tokens and not for drawn ones."""
    return sampling.temperature == 0 or sampling.top_k == 1 or (sampling.top_k == 0 and sampling.top_p == 0)


def idle_of(
    sampling: SamplingConfig,
    taker: PlanItem,
    by_fields: bool,
    chosen: Iterable[PlanItem],
    log_probs: bool,
    looks: bool,
) -> dict[object, str]:
    """Processors that are left out where nothing is drawn: key to what is said about it.

    ``taker`` takes the tokens, ``by_fields``: because the request's fields say so. ``looks``: a plugin that is no
    processor sees the logits that were chosen from.
    """
    idle: dict[object, str] = {}
    greedy = taker.plugin.capabilities.greedy  # type: ignore[attr-defined]
    draws = not (greedy or (by_fields and asks_greedy(sampling)))
    preset, named = PRESETS[sampling.preset], {use.name for use in sampling.logits_processors}
    for item in chosen:
        phase, capabilities = item.plugin.phase, item.plugin.capabilities  # type: ignore[attr-defined]
        seen = looks or (log_probs and phase not in preset.unscored)
        if greedy and capabilities.argmax_invariant and not seen:
            idle[item.key] = f"{item.name}: left out, it cannot change which logit is largest"
        elif not draws and phase in preset.only_drawn and not item.passed and item.name not in named:
            idle[item.key] = f"{item.name}: left out, in preset {sampling.preset} it shapes drawn choices only"
    return idle
