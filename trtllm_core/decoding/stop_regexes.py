"""Stop regexes: patterns in the text that end a branch, wherever the borders of its tokens are."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_core.config.patterns import GrowingPattern, growing_pattern
from trtllm_core.errors import BranchError, ConfigError
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import HostStoppingCriterion, Stop, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext

TIME_LIMIT = 1.0
"""Seconds that one search may take: some patterns take exponential time on some texts."""


class _Mark(NamedTuple):
    """Where the search stands after a token."""

    length: int
    """Characters of the text."""
    rest: bytes
    """The bytes of a character that is not complete."""
    begins: tuple[int, ...]
    """For each pattern the first character at which a match may begin that has not been found yet."""


@dataclass(slots=True)
class _State:
    patterns: tuple[GrowingPattern, ...]
    text: str
    """All complete characters. What is no UTF-8 is there byte by byte, as lone surrogates."""
    marks: list[_Mark]
    """One for each token, and one for the beginning."""
    steady: bool
    """Whether a text without a match has no beginning with one, so that one search of it is enough."""


class StopRegexes(HostStoppingCriterion):
    r"""Stops where one of ``stop_regexes`` is found in the generated text, and cuts the text before the match.

    The text is searched anew after each character, not after each token, and the first find counts; of several at the
    same character the one that begins first. So what stops does not depend on how the text came in tokens. The end
    of the text so far is an end to ``$``, ``\b`` and lookaheads, because nobody knows what follows.

    Only what a match may have begun in is searched: the ``regex`` package tells where that is.
    """

    capabilities = StoppingCapabilities(speculation="rewind", needs=frozenset({"text"}))
    examples = (Example(sampling={"stop_regexes": ("a[bc]+d", "h{2}")}),)

    def setup(self, context: DecodingContext) -> None:
        self._bytes = context.text

    def start(self, view: BranchView) -> _State:
        if self._bytes is None:
            raise ConfigError("stop_regexes needs text, but the engine has no tokenizer: use stop_words_list")
        patterns = tuple(growing_pattern(pattern) for pattern in view.sampling.stop_regexes)
        steady = all(pattern.steady for pattern in patterns)
        return _State(patterns, "", [_Mark(0, b"", (0,) * len(patterns))], steady)

    def check(self, state: _State, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        text, mark = state.text, state.marks[-1]
        for at, token in enumerate(new):
            known = mark.length
            added, rest = _complete(mark.rest + self._bytes([token]))
            text += added
            begins, ends = mark.begins, range(known + 1, len(text) + 1)
            if added and state.steady:
                begins, match = _search(state.patterns, text, mark.begins, len(text))
                begins, ends = (begins, range(0)) if match is None else (mark.begins, ends)
            for end in ends:
                begins, match = _search(state.patterns, text, begins, end)
                if match is not None:
                    begin = match.start()
                    return Stop("stop_regex", at, trim_text=_size(text[begin:]) + len(rest), matched=_shown(match))
            mark = _Mark(len(text), rest, begins)
        return None

    def accept(self, state: _State, tokens: Sequence[int]) -> _State:
        for token in tokens:
            mark = state.marks[-1]
            added, rest = _complete(mark.rest + self._bytes([token]))
            state.text += added
            begins = _search(state.patterns, state.text, mark.begins, len(state.text))[0] if added else mark.begins
            state.marks.append(_Mark(len(state.text), rest, begins))
        return state

    def pending_text(self, state: _State) -> int:
        mark = state.marks[-1]
        begin = min(mark.begins, default=mark.length)
        return _size(state.text[begin:]) + len(mark.rest) if begin < mark.length else 0

    def copy(self, state: _State) -> _State:
        return _State(state.patterns, state.text, state.marks.copy(), state.steady)

    def take_back(self, state: _State, n: int) -> _State:
        del state.marks[len(state.marks) - n :]
        state.text = state.text[: state.marks[-1].length]
        return state


def _search(
    patterns: Sequence[GrowingPattern], text: str, begins: tuple[int, ...], end: int
) -> tuple[tuple[int, ...], Any]:
    """Search the first ``end`` characters of ``text``.

    Returns:
        Where matches may begin from now on, and the match that begins first, or None.
    """
    found, match = [], None
    for pattern, begin in zip(patterns, begins, strict=True):
        try:
            first, answer = pattern.search(text, begin, end, TIME_LIMIT)
        except TimeoutError:
            raise BranchError(f"stop regex {pattern.pattern!r} took more than {TIME_LIMIT:g} s to search") from None
        found.append(first)
        if answer is not None and (match is None or answer.start() < match.start()):
            match = answer
    return tuple(found), match


def _complete(data: bytes) -> tuple[str, bytes]:
    """The complete characters of ``data``, and the bytes of one that is not."""
    text, used = codecs.utf_8_decode(data, "surrogateescape", False)
    return text, data[used:]


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _shown(match: Any) -> str:
    """The text that matched, as the user would see it."""
    text: str = match.group()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
