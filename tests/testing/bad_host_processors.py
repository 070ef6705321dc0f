"""A sound host processor, and others that each break one promise."""

from __future__ import annotations

from trtllm_core.plugin import HostLogitsProcessor, LogitsCapabilities, Phase


class Alternating(HostLogitsProcessor):
    """A sound host processor with a mask: forbids the last token that was generated, and its neighbour."""

    phase = Phase.CONSTRAINT
    capabilities = LogitsCapabilities(speculation="rewind")

    def start(self, view):
        return ()

    def mask(self, state, tokens, words):
        bits = words.view("uint32")
        for token in state[-1:]:
            for each in (token, token ^ 1):
                bits[each // 32] &= ~(1 << each % 32) & 0xFFFFFFFF
        return bool(state)

    def accept(self, state, tokens):
        return (*state, *tokens)

    def take_back(self, state, n):
        return state[: len(state) - n]


class SharesForks(HostLogitsProcessor):
    """Its copies are the same list."""

    phase = Phase.PENALTY

    def start(self, view):
        return []

    def process(self, state, tokens, logits):
        for token in state:
            logits[token] -= 0.5

    def accept(self, state, tokens):
        state += tokens
        return state

    def copy(self, state):
        return state


class HostMovesInMask(Alternating):
    calls = 0

    def mask(self, state, tokens, words):
        self.calls += 1
        return super().mask((*state, self.calls % 7), tokens, words)


class HostTakesNothingBack(Alternating):
    take_back = HostLogitsProcessor.take_back


class HostTakesTooMuchBack(Alternating):
    def take_back(self, state, n):
        return state[: max(0, len(state) - n - 1)]


class BlindToCompanions(Alternating):
    def companions(self, view):
        return [[1]]


class MaskOfTheStepBefore(Alternating):
    """What it says when its mask is prepared depends on who asks."""

    asked = 0

    def mask(self, state, tokens, words):
        self.asked += 1
        return super().mask(state, tokens, words) if self.asked <= 6 else False
