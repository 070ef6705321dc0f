"""Budget forcing: how many tokens a model may, and must, think before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field, model_validator

from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchView, DecodingContext, HostLogitsProcessor, LogitsCapabilities, Phase

Tokens = tuple[int, ...]


class Place(NamedTuple):
    """Where a text stands after one of its tokens."""

    spent: int = -1
    """Tokens of the thought so far; -1 outside one."""
    forced: int = 0
    """How many tokens of the closing words have been forced."""
    tail: Tokens = ()
    """The last tokens, as many as the longest marker has."""


class State(NamedTuple):
    """A branch: its parameters, and its place after each generated token, the prompt's first."""

    params: ThinkingBudget.Params
    places: list[Place]


class ThinkingBudget(HostLogitsProcessor):
    """Counts the tokens after ``start``. At ``most`` of them only ``close`` may follow, word for word; until there are
    ``least``, the last token of ``end`` may not come where it would complete it."""

    phase = Phase.CONSTRAINT
    capabilities = LogitsCapabilities(speculation="rewind")

    class Params(BaseModel, extra="forbid", frozen=True):
        """Markers are token ids, as the model's tokenizer writes them."""

        start: Tokens = Field(min_length=1, description="begins a thought, such as <think>")
        end: Tokens = Field(min_length=1, description="ends it, such as </think>")
        most: int = Field(ge=0, description="tokens of a thought before it is closed")
        least: int = Field(default=0, ge=0, description="tokens of a thought before its end is allowed")
        close: Tokens = Field(default=(), description="what is forced: ends with `end`; () is `end` alone")

        @model_validator(mode="after")
        def _check(self) -> ThinkingBudget.Params:
            if self.least > self.most:
                raise ValueError("least must be at most most")
            if self.close and self.close[-len(self.end) :] != self.end:
                raise ValueError("close must end with end")
            return self

        @property
        def closing(self) -> Tokens:
            """The tokens that are forced."""
            return self.close or self.end

    def setup(self, context: DecodingContext) -> None:
        """Once a session."""
        self._vocab = context.vocab_size

    def start(self, view: BranchView) -> State:
        """A new branch: a thought may have begun in its prompt."""
        params = view.params
        if max(params.start + params.closing) >= self._vocab or min(params.start + params.closing) < 0:
            raise ConfigError(f"thinking_budget: its markers are not in the vocabulary of {self._vocab} tokens")
        place = Place()
        for token in view.prompt:
            place = after(place, token, params)
        return State(params, [place])

    def mask(self, state: State, tokens: Sequence[int], words: np.ndarray) -> bool:
        """Close the thought, or keep it open."""
        params, place = state.params, state.places[-1]
        bits = words.view("uint32")
        if is_closing(place, params):
            token = params.closing[place.forced]
            bits.fill(0)
            bits[token // 32] = np.uint32(1 << token % 32)
            return True
        if 0 <= place.spent < params.least and (place.tail + params.end[-1:])[-len(params.end) :] == params.end:
            token = params.end[-1]
            bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
            return True
        return False

    def accept(self, state: State, tokens: Sequence[int]) -> State:
        """Tokens were committed."""
        for token in tokens:
            state.places.append(after(state.places[-1], token, state.params))
        return state

    def copy(self, state: State) -> State:
        """Of a forked branch."""
        return State(state.params, state.places.copy())

    def take_back(self, state: State, n: int) -> State:
        """The places of the last n tokens are forgotten."""
        del state.places[len(state.places) - n :]
        return state

    def forced(self, state: State) -> Tokens:
        """What must come next, once the budget is used up."""
        params, place = state.params, state.places[-1]
        return params.closing[place.forced :] if is_closing(place, params) else ()


def is_closing(place: Place, params: ThinkingBudget.Params) -> bool:
    """Whether the next token is forced."""
    return place.forced > 0 or place.spent >= params.most


def after(place: Place, token: int, params: ThinkingBudget.Params) -> Place:
    """Where the text stands after one more token."""
    tail = (*place.tail, token)[-max(len(params.start), len(params.end)) :]
    if place.spent < 0:
        return Place(0 if tail[-len(params.start) :] == params.start else -1, 0, tail)
    forced = place.forced + 1 if is_closing(place, params) and token == params.closing[place.forced] else 0
    if forced == len(params.closing) or (not forced and tail[-len(params.end) :] == params.end):
        return Place(-1, 0, tail)
    return Place(place.spent + 1, forced, tail)
