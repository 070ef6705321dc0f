"""Stop strings: text that ends a branch, wherever the borders of its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_core.errors import ConfigError
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import HostStoppingCriterion, Stop, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext


@dataclass(slots=True)
class _State:
    strings: tuple[bytes, ...]
    pieces: list[bytes]
    """The text of each generated token."""
    reach: int
    """How far back a match can begin that has not ended yet, in bytes."""

    def tail(self) -> bytes:
        """The last ``reach`` bytes of the text."""
        found: list[bytes] = []
        missing = self.reach
        for piece in reversed(self.pieces):
            if missing <= 0:
                break
            found.append(piece)
            missing -= len(piece)
        text = b"".join(reversed(found))
        return text[max(0, len(text) - self.reach) :]


class StopStrings(HostStoppingCriterion):
    """Stops where the generated text holds one of ``stop_strings``, and cuts the text before the match.

    Strings are compared as UTF-8 bytes, so that a match may begin and end within tokens. Of several matches the one
    that ends first counts, and of those the longest: what stops does not depend on how the text came in tokens.
    """

    capabilities = StoppingCapabilities(speculation="rewind", needs=frozenset({"text"}))
    examples = (Example(sampling={"stop_strings": ("abc", "ca", "hh")}),)

    def setup(self, context: DecodingContext) -> None:
        self._text = context.text

    def start(self, view: BranchView) -> _State:
        if self._text is None:
            raise ConfigError("stop_strings needs text, but the engine has no tokenizer: use stop_words_list")
        strings = tuple(string.encode() for string in view.sampling.stop_strings)
        return _State(strings, [], max(map(len, strings), default=1) - 1)

    def check(self, state: _State, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        text = state.tail()
        for at, token in enumerate(new):
            known = len(text)
            text += self._text([token])
            match = _first_match(text, state.strings, known)
            if match is not None:
                begin, string = match
                return Stop("stop_string", at, trim_text=len(text) - begin, matched=string.decode())
        return None

    def accept(self, state: _State, tokens: Sequence[int]) -> _State:
        state.pieces.extend(self._text([token]) for token in tokens)
        return state

    def pending_text(self, state: _State) -> int:
        tail = state.tail()
        begins = (n for n in range(len(tail), 0, -1) if any(string.startswith(tail[-n:]) for string in state.strings))
        return next(begins, 0)

    def copy(self, state: _State) -> _State:
        return _State(state.strings, state.pieces.copy(), state.reach)

    def take_back(self, state: _State, n: int) -> _State:
        del state.pieces[len(state.pieces) - n :]
        return state


def _first_match(text: bytes, strings: Sequence[bytes], known: int) -> tuple[int, bytes] | None:
    """Where a string begins in ``text``, and which, among those that end after its first ``known`` bytes."""
    found = []
    for string in strings:
        begin = text.find(string, max(0, known - len(string) + 1))
        if begin >= 0:
            found.append((begin + len(string), begin, string))
    if not found:
        return None
    _, begin, string = min(found)
    return begin, string
