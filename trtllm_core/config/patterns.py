"""Regular expressions that are followed through a text that is still growing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_LOOKING = {  # \b and the like as lookarounds: of these, partial matching knows what text to come may change
    r"\b": r"(?:(?<=\w)(?!\w)|(?<!\w)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<!\w)(?!\w))",
    r"\m": r"(?:(?<!\w)(?=\w))",
    r"\M": r"(?:(?<=\w)(?!\w))",
}
_UNFIT = (
    (re.compile(r"\\G"), "depends on where a search starts"),
    (re.compile(r"\\K"), "hides where a match began: use a lookbehind, (?<=…)"),
    (re.compile(r"\(\?[a-zA-Z0-9]*w"), "uses word boundaries that depend on text far ahead"),
    (re.compile(r"\(\?[a-zA-Z0-9]*x"), "has comments of its own: write it without (?x)"),
    (re.compile(r"\{[\d\s<=+,]*[eids][\d\s<=+,:}]"), "matches approximately"),
)
_AHEAD = ("$", "(?=", "(?!", "(?>", "(?(", "(?R", "(?&", "(?P>", *(f"(?{digit}" for digit in range(10)))
_AHEAD += (r"\b", r"\B", r"\m", r"\M", r"\Z", r"\z", r"\X", r"\R")
_TOKEN = re.compile(r"\\.|\(\?#[^)]*\)|\[|\(\?>|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)
_CLASS = re.compile(r"\\.|\[:\^?\w+:\]|\[|\]|.", re.DOTALL)


@dataclass(frozen=True)
class GrowingPattern:
    """A regular expression of the ``regex`` package, and where in a growing text it may begin to match.

    Attributes:
        pattern: as the user wrote it.
        exact: what it means (a ``regex.Pattern``).
        finder: begins to match where ``exact`` does, and its partial matches can be relied on.
        steady: what matched a text still matches when more text comes, so that a text without a match has no beginning
            with one.
    """

    pattern: str
    exact: Any
    finder: Any
    steady: bool

    def search(self, text: str, begin: int, end: int, timeout: float) -> tuple[int, Any]:
        """Search the first ``end`` characters of ``text``, of which a match can begin at ``begin`` at the earliest.

        Args:
            timeout: seconds until it gives up.

        Returns:
            The first place at which a match begins, or may begin when more text comes (``end`` if none); and the match.

        Raises:
            TimeoutError: it took too long.
        """
        found = self.finder.search(text, begin, end, partial=True, timeout=timeout)
        if found is None:
            return end, None
        if found.partial:
            return found.start(), None
        return found.start(), self.exact.search(text, begin, end, timeout=timeout)


@lru_cache(maxsize=256)
def growing_pattern(pattern: str) -> GrowingPattern:
    """Compile a pattern.

    Raises:
        ValueError: it is no regular expression, matches the empty text, or cannot be followed through a growing text.
    """
    import regex  # when somebody asks for one

    try:
        exact = regex.compile(pattern)
        found = _unfit(pattern)
        finder = None if found else regex.compile(_reliable(pattern))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if found:
        raise ValueError(f"{pattern!r} {found}")
    if exact.flags & regex.REVERSE:
        raise ValueError(f"{pattern!r} searches backwards, where the text has no end yet")
    if exact.search("") is not None:
        raise ValueError(f"{pattern!r} matches the empty text and would stop at once")
    return GrowingPattern(pattern, exact, finder, _is_steady(pattern))


def _unfit(pattern: str) -> str | None:
    """Why a pattern cannot be followed, if it cannot."""
    plain = pattern.replace(r"\\", "")
    for sign, why in _UNFIT:
        if sign.search(plain):
            return why
    tokens = [token for token, _ in _tokens(pattern)]
    if any(_is_lazy(token) for token in tokens) and any(
        token == "(?>" or (len(token) > 1 and token[-1] == "+" and token[0] != "\\") for token in tokens
    ):
        return "has lazy and possessive repeats: use one kind"
    return None


def _is_steady(pattern: str) -> bool:
    """Whether nothing in a pattern looks at what follows, or gives no way back. In doubt it is not."""
    parts = [token for token, in_class in _tokens(pattern) if not in_class]
    plain = "".join(part if part[0] != "\\" else part if part in _AHEAD else "" for part in parts)
    possessive = any(len(part) > 1 and part[-1] == "+" and part[0] != "\\" for part in parts)
    return not possessive and not any(sign in plain for sign in _AHEAD)


def _reliable(pattern: str) -> str:
    """The same pattern in the words in which partial matching misses nothing.

    A repeat is greedy instead of lazy, which changes where a match ends but not where it begins: of a lazy repeat that
    reaches the end of the text, ``regex`` does not say in all cases that more text may help.
    """
    return "".join(
        token if in_class else token[:-1] if _is_lazy(token) else _LOOKING.get(token, token)
        for token, in_class in _tokens(pattern)
    )


def _is_lazy(token: str) -> bool:
    return len(token) > 1 and token[-1] == "?" and token[0] in "*+?{"


def _tokens(pattern: str) -> Iterator[tuple[str, bool]]:
    """The parts of a pattern in order: escapes, repeats, characters, and sets of characters, which are marked."""
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        assert match is not None
        if match[0] == "[":
            end = _end_of_class(pattern, at)
            yield pattern[at:end], True
            at = end
        else:
            yield match[0], False
            at = match.end()


def _end_of_class(pattern: str, at: int) -> int:
    """Behind the set of characters that begins at ``at``. A bracket within counts where sets may be nested."""
    nested, depth = "(?V1)" in pattern or "(?1)" in pattern, 1
    at += 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"
    while depth and at < len(pattern):
        match = _CLASS.match(pattern, at)
        assert match is not None
        depth += nested * (match[0] == "[") - (match[0] == "]")
        at = match.end()
    return at
