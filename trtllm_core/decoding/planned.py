"""The last plan that was made: requests of the same wishes need not be planned again."""

from __future__ import annotations

from dataclasses import replace

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.plan import Plan

APART = frozenset({"max_new_tokens", "random_seed"})
"""Fields that no plan depends on: it only says that they were asked for. They differ from request to request."""


class LastPlan:
    """What any request of the same wishes has as its plan, whatever its prompt."""

    def __init__(self) -> None:
        self._made: tuple[SamplingConfig, frozenset[str], Plan] | None = None

    def keep(self, sampling: SamplingConfig, plan: Plan) -> None:
        """It was made of this config alone, and of no prompt."""
        self._made = sampling, sampling.asked(), plan

    def forget(self) -> None:
        """What plans depend on besides has changed."""
        self._made = None

    def of(self, sampling: SamplingConfig) -> Plan | None:
        """The plan of this config; None: it must be made."""
        if self._made is None:
            return None
        before, asked, plan = self._made
        if before is sampling:
            return plan
        if sampling.asked() != asked:
            return None
        if not all(_same(getattr(before, one), getattr(sampling, one)) for one in asked - APART):
            return None
        return replace(plan, asked={**plan.asked, **{name: getattr(sampling, name) for name in asked & APART}})


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a plugin's parameters may be tensors or arrays, which do not say whether they are equal
        return False
