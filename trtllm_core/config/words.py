"""The classic runtime's form of stop and bad words: one array of tokens and ends."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_core.errors import ConfigError


def words_of(rows: Sequence[Sequence[Sequence[int]]]) -> list[list[tuple[int, ...]]]:
    """The words of each request, from integers ``[batch, 2, L]`` as nested lists.

    ``[b, 0]`` are the tokens of all words of a request, ``[b, 1]`` where each word ends in it, padded with -1.

    Raises:
        ConfigError: the ends do not rise, or are beyond the tokens.
    """
    result = []
    for tokens, ends in rows:
        ends = ends[: ends.index(-1)] if -1 in ends else ends
        starts = [0, *ends[:-1]]
        if any(end <= start or end > len(tokens) for start, end in zip(starts, ends, strict=False)):
            raise ConfigError(f"a word list's ends must rise and be at most {len(tokens)}, not {list(ends)}")
        result.append([tuple(tokens[start:end]) for start, end in zip(starts, ends, strict=False)])
    return result
