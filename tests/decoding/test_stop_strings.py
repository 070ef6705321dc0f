"""Stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.decoding.detokenizer import TextStream, TokenBytes
from trtllm_core.decoding.stop_strings import StopStrings
from trtllm_core.errors import ConfigError

PIECES = [b"a", b"b", b"c", b"ab", b"bca", b"", b"\xf0\x9f", b"\x98\x80", b"abcabc"]
TEXT = TokenBytes(PIECES)


def started(new_floor, strings, text=TEXT):
    floor = new_floor(text=text)
    criterion = StopStrings()
    criterion.setup(floor.context)
    return criterion, criterion.start(floor.view(0, [0], stop_strings=strings))


def generate(criterion, state, steps):
    """Feed tokens as a loop would: the text that is left, the text as a stream showed it, and the stop."""
    stream, shown = TextStream(TEXT), ""
    for new in steps:
        stop = criterion.check(state, [], new)
        if stop is not None:
            state = criterion.accept(state, new[: stop.at + 1])
            shown += stream.finish(new[: stop.at + 1], stop.trim_text)
            return stream.data, shown, stop
        state = criterion.accept(state, new)
        shown += stream.push(new, criterion.pending_text(state))
    shown += stream.finish()
    return stream.data, shown, None


def test_match_within_and_across_tokens(new_floor):
    criterion, state = started(new_floor, ["cab"])
    text, shown, stop = generate(criterion, state, [[0], [4, 1, 2]])  # a bca|b c
    assert (text, shown) == (b"ab", "ab")
    assert (stop.reason, stop.at, stop.trim_text, stop.matched) == ("stop_string", 1, 3, "cab")


def test_what_may_be_the_beginning_of_a_match_is_held_back(new_floor):
    criterion, state = started(new_floor, ["bcb", "cc"])
    state = criterion.accept(state, [3])
    assert criterion.pending_text(state) == 1
    state = criterion.accept(state, [2])
    assert criterion.pending_text(state) == 2
    state = criterion.accept(state, [0])
    assert criterion.pending_text(state) == 0


def test_a_character_over_two_tokens(new_floor):
    criterion, state = started(new_floor, ["😀"])
    text, shown, stop = generate(criterion, state, [[0], [6], [7]])
    assert (text, shown, stop.trim_text) == (b"a", "a", 4)


@given(
    st.lists(st.text("abc😀", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_against_a_search_in_the_whole_text(new_floor, strings, steps):
    criterion, state = started(new_floor, strings)
    text, shown, stop = generate(criterion, state, steps)
    whole = TEXT([token for new in steps for token in new])
    needles = [string.encode() for string in strings]
    ends = [(whole.find(n) + len(n), whole.find(n)) for n in needles if n in whole]
    if not ends:
        assert stop is None
        assert text == whole
    else:
        assert text == whole[: min(ends)[1]]
        assert stop.matched.encode() in needles
    assert shown == text.decode("utf-8", "replace")


@given(
    st.lists(st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xf0\x9f\x98", b"\x80", "é".encode()]), max_size=14),
    st.lists(st.integers(1, 5), min_size=14, max_size=14),
    st.lists(st.text("abé😀", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_the_cut_of_any_bytes_is_the_same_however_they_come(new_floor, parts, sizes, strings):
    data = b"".join(parts)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    pieces.append(data[at:])
    text = TokenBytes(pieces)
    criterion, state = started(new_floor, strings, text)
    stream, shown, stop = TextStream(text), "", None
    for token in range(len(pieces)):
        stop = criterion.check(state, [], [token])
        if stop is not None:
            shown += stream.finish([token], stop.trim_text)
            break
        state = criterion.accept(state, [token])
        shown += stream.push([token], criterion.pending_text(state))
    else:
        shown += stream.finish()
    needles = [string.encode() for string in strings]
    ends = [(data.find(n) + len(n), data.find(n)) for n in needles if n in data]
    assert stream.data == (data[: min(ends)[1]] if ends else data)
    assert shown == stream.data.decode("utf-8", "replace")
    assert not any(n in stream.data for n in needles)
    assert (stop is None) == (not ends)


def test_copy_and_take_back(new_floor):
    criterion, state = started(new_floor, ["abc"])
    state = criterion.accept(state, [0, 1])
    other = criterion.copy(state)
    state = criterion.take_back(state, 1)
    assert criterion.check(state, [], [2]) is None
    assert criterion.check(other, [], [2]).trim_text == 3
    assert criterion.take_back(other, 0) is other
    assert criterion.check(other, [], [2]) == criterion.check(other, [], [2])


def test_an_engine_without_a_tokenizer(new_floor):
    with pytest.raises(ConfigError, match="no tokenizer"):
        started(new_floor, ["x"], text=None)
