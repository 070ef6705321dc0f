"""``guided``: a logits processor that allows only tokens with which the text can still become what was asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher

from trtllm_core.errors import BranchError, ConfigError
from trtllm_core.plugin import BranchView, DecodingContext, HostLogitsProcessor, LogitsCapabilities, Phase
from trtllm_plugin_guided.grammar import GuidedParams
from trtllm_plugin_guided.vocabulary import Vocabulary

KEPT = 64
"""Grammars whose compiled form is kept for the next request."""

DEAD_END = "no token of the vocabulary fits the grammar here"


@dataclass(slots=True)
class GuidedState:
    """Where one branch is in its grammar."""

    matcher: LLMatcher
    end_ids: tuple[int, ...]
    after_end: int = 0
    """Tokens from the end token on, which the matcher is not told of."""


class Guided(HostLogitsProcessor):
    """Masks all tokens that the request's grammar cannot go on with. Its end tokens are allowed where it may end.

    A state is a matcher of llguidance: a parser of bytes that gives tokens back, and is copied for a fork.
    """

    phase = Phase.CONSTRAINT
    capabilities = LogitsCapabilities(speculation="rewind", needs=frozenset({"text"}))
    Params = GuidedParams

    def setup(self, context: DecodingContext) -> None:
        """See ``HostLogitsProcessor``, as all that follows."""
        self._vocabulary = Vocabulary.of(context)
        self._words = np.zeros(self._vocabulary.words, np.int32)  # a mask as llguidance has it, the end included
        self._address = self._words.ctypes.data
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def start(self, view: BranchView) -> GuidedState:
        if not view.end_ids:
            raise ConfigError("guided needs a token that ends the text, but this request has none: set end_id")
        return GuidedState(self._matcher(view.params.for_matcher()), view.end_ids)

    def mask(self, state: GuidedState, tokens: Sequence[int], words: np.ndarray) -> bool:
        if state.after_end:
            return False  # drafts behind an end: nobody will choose from here
        matcher, own = state.matcher, self._words
        matcher.unsafe_compute_mask_ptr(self._address, own.nbytes)
        if matcher.is_error():
            raise BranchError(_why(matcher))
        _clear(own, self._vocabulary.end)
        words[: len(own)] = own[: len(words)]
        words[len(own) :] = 0
        may_end = matcher.is_accepting()
        for token in state.end_ids:
            (_set if may_end else _clear)(words, token)
        if not may_end and not words.any():
            raise BranchError(DEAD_END)
        return True

    def accept(self, state: GuidedState, tokens: Sequence[int]) -> GuidedState:
        for token in tokens:
            if state.after_end or (token in state.end_ids and state.matcher.is_accepting()):
                state.after_end += 1
            elif not state.matcher.try_consume_tokens([token]):
                raise BranchError(f"token {token} does not fit the grammar: something else overruled its mask")
        return state

    def copy(self, state: GuidedState) -> GuidedState:
        return GuidedState(state.matcher.deep_copy(), state.end_ids, state.after_end)

    def take_back(self, state: GuidedState, n: int) -> GuidedState:
        behind = min(n, state.after_end)
        state.after_end -= behind
        if n > behind and not state.matcher.rollback(n - behind):
            raise RuntimeError(f"llguidance cannot take {n - behind} tokens back: {state.matcher.get_error()}")
        return state

    def forced(self, state: GuidedState) -> Sequence[int]:
        if state.after_end:
            return ()
        if state.matcher.is_stopped():
            return state.end_ids if len(state.end_ids) == 1 else ()
        return [token for token in state.matcher.compute_ff_tokens() if token < self._vocabulary.end]

    def _matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of a text: a copy of one that was compiled before, where there is one."""
        compiled = self._compiled.pop(grammar, None) or LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0)
        if compiled.is_error():
            raise ConfigError(f"guided: {compiled.get_error().splitlines()[0]}")
        self._compiled[grammar] = compiled
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()


def _why(matcher: LLMatcher) -> str:
    error = matcher.get_error().splitlines()[0]
    return DEAD_END if error.startswith("NoExtension") else f"the grammar cannot be followed: {error}"


def _set(words: np.ndarray, token: int) -> None:
    if token // 32 < len(words):
        words[token // 32] |= np.int32(_bit(token))


def _clear(words: np.ndarray, token: int) -> None:
    if token // 32 < len(words):
        words[token // 32] &= np.int32(~_bit(token))


def _bit(token: int) -> int:
    """The bit of a token within its word, as a signed number."""
    return -(1 << 31) if token % 32 == 31 else 1 << (token % 32)
