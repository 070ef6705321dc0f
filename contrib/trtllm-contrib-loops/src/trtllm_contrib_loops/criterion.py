"""Stopping where a text only repeats itself, with loops of any length up to a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from trtllm_core.plugin import BranchView, HostStoppingCriterion, Stop, StoppingCapabilities


class State(NamedTuple):
    """A branch."""

    params: Loop.Params
    tokens: list[int]
    """What was generated."""
    runs: np.ndarray
    """int64 ``[max_period]``: ``runs[p - 1]`` last tokens equal those p places before them."""


class Loop(HostStoppingCriterion):
    """Stops where the text ends with at least ``times`` copies of one period, and at least ``least`` tokens of them.

    For each period p up to ``max_period`` it counts how long the text has equalled itself p tokens before. One more
    token changes all counts by one comparison each, so that long periods cost as little as short ones: a list that
    begins anew after 300 tokens is found as a stutter is.
    """

    capabilities = StoppingCapabilities(speculation="rewind")

    class Params(BaseModel, extra="forbid", frozen=True):
        """What counts as a loop."""

        times: int = Field(default=3, ge=2, description="copies of the period, the first one included")
        least: int = Field(default=24, ge=1, description="tokens that all copies have together, at least")
        max_period: int = Field(default=512, ge=1, le=65536, description="the longest period that is looked for")

    def start(self, view: BranchView) -> State:
        """A new branch. Loops of the prompt are the prompt's."""
        return State(view.params, [], np.zeros(view.params.max_period, np.int64))

    def check(self, state: State, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        """Whether a loop is complete with one of the new tokens."""
        seen, runs = state.tokens[-state.params.max_period :], state.runs
        for at, token in enumerate(new):
            runs = longer(runs, seen, token)
            seen.append(token)
            if period := self._complete(runs, state.params):
                return Stop("loop", at, matched=tuple(seen[-period:]))
        return None

    def _complete(self, runs: np.ndarray, params: Loop.Params) -> int:
        """The shortest period of a complete loop, or 0."""
        periods = np.arange(1, len(runs) + 1)
        loops = runs >= np.maximum((params.times - 1) * periods, params.least - periods)
        return int(loops.argmax()) + 1 if loops.any() else 0

    def accept(self, state: State, tokens: Sequence[int]) -> State:
        """Tokens were committed."""
        runs = state.runs
        for token in tokens:
            runs = longer(runs, state.tokens, token)
            state.tokens.append(token)
        return state._replace(runs=runs)

    def copy(self, state: State) -> State:
        """Of a forked branch: counts are replaced, never changed."""
        return state._replace(tokens=state.tokens.copy())

    def take_back(self, state: State, n: int) -> State:
        """The counts are made anew: a rewind is rare."""
        kept = state.tokens[: len(state.tokens) - n]
        state.tokens.clear()
        return self.accept(state._replace(runs=np.zeros_like(state.runs)), kept)


def longer(runs: np.ndarray, seen: Sequence[int], token: int) -> np.ndarray:
    """The counts after one more token: int64 ``[max_period]``."""
    before = np.full(len(runs), -1)
    last = seen[-len(runs) :][::-1]
    before[: len(last)] = last
    return np.where(before == token, runs + 1, 0)
