"""Stop regexes: held against a search of every beginning of the text, for random texts, patterns and tokens."""

from __future__ import annotations

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtllm_core import SamplingConfig
from trtllm_core.decoding import stop_regexes
from trtllm_core.decoding.detokenizer import TextStream, TokenBytes
from trtllm_core.decoding.stop_regexes import StopRegexes
from trtllm_core.errors import BranchError, ConfigError
from trtllm_core.plugin import Stop

BYTES = TokenBytes([bytes([i]) for i in range(256)])


def started(new_floor, patterns, text=BYTES):
    floor = new_floor(text=text)
    criterion = StopRegexes()
    criterion.setup(floor.context)
    return criterion, criterion.start(floor.view(0, [0], stop_regexes=patterns))


def generate(criterion, state, steps, text=BYTES):
    """Feed tokens as a loop would: the bytes that are left, what each step showed, and the stop."""
    stream, shown = TextStream(text), []
    for new in steps:
        stop = criterion.check(state, [], new)
        assert criterion.check(state, [], new) == stop, "check is pure"
        if stop is not None:
            shown.append(stream.finish(new[: stop.at + 1], stop.trim_text))
            return stream.data, shown, stop
        state = criterion.accept(state, new)
        shown.append(stream.push(new, criterion.pending_text(state)))
    shown.append(stream.finish())
    return stream.data, shown, None


def reference(data: bytes, patterns):
    """Bytes before the match, and what matched: a fresh search of each beginning of the text."""
    text = data.decode("utf-8", "surrogateescape")
    for end in range(1, len(text) + 1):
        found = [m for p in patterns if (m := regex.search(p, text[:end]))]
        if found:
            first = min(found, key=lambda m: m.start())
            return text[: first.start()].encode("utf-8", "surrogateescape"), first.group()
    return data, None


@st.composite
def cut(draw, data):
    """The bytes in tokens of any length, and these in steps of up to three."""
    tokens, steps, at = [], [], 0
    while at < len(data):
        size = draw(st.integers(1, 4))
        tokens.append(data[at : at + size])
        at += size
    while tokens:
        count = draw(st.integers(1, 3))
        steps.append(tokens[:count])
        tokens = tokens[count:]
    return steps


ATOMS = [
    "a", "b", "ab", "[ab]", ".", r"\d", "é", "😀", r"\n", r"\b", "$", "^", "(?m:^)", "(?<=a)", "(?<!b)", "(?=b)",
    "(?!a)", r"\W", "(a|ab)", r"\B", r"\m", r"\M", "(?!ab)", r"(?!\b)", r"[]\b]", "(?<=a(?!b))", "(?:(?!ab).)",
]  # fmt: skip
patterns = st.lists(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(["", "", "", "+", "{2}", "+?", "*?", "*b", "?1"])),
    min_size=1,
    max_size=4,
).map(lambda parts: "".join(f"(?:{atom}){times}" if times else atom for atom, times in parts))
texts = st.one_of(
    st.text("abab1é😀\n ", max_size=14).map(str.encode),
    st.lists(st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"1"]), max_size=10).map(
        b"".join
    ),
)


def fits(pattern):
    try:
        SamplingConfig(stop_regexes=pattern)
    except ConfigError:
        return False
    return True


@given(st.data(), st.lists(patterns, min_size=1, max_size=2), texts)
@settings(max_examples=600, deadline=None)
def test_against_a_search_of_every_beginning_of_the_text(new_floor, data, asked, whole):
    assume(all(map(fits, asked)))
    pieces = data.draw(cut(whole))
    vocabulary = [piece for step in pieces for piece in step]
    text = TokenBytes(vocabulary)
    numbers = iter(range(len(vocabulary)))
    steps = [[next(numbers) for _ in step] for step in pieces]
    criterion, state = started(new_floor, asked, text)
    # A character that the text ends in the middle of is none.
    complete = len(whole) - len(stop_regexes._complete(whole)[1])
    want, matched = reference(whole[:complete], asked)
    left, shown, stop = generate(criterion, state, steps, text)
    if matched is None:
        assert (stop, left) == (None, whole)
    else:
        assert left == want
        assert stop.reason == "stop_regex"
        assert stop.matched == matched.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert "".join(shown) == left.decode("utf-8", "replace")


@given(st.data(), patterns, texts, st.integers(0, 9), st.integers(0, 14))
@settings(max_examples=200, deadline=None)
def test_rewind_and_fork_leave_the_state_of_a_branch_that_never_went_there(new_floor, data, asked, whole, n, kept):
    assume(fits(asked))
    ids = list(whole)
    criterion, state = started(new_floor, [asked])
    for token in ids:
        state = criterion.accept(state, [token])
    n, kept = min(n, len(ids)), min(kept, len(ids))
    other = criterion.copy(state)
    state = criterion.take_back(state, n)
    _, plain = started(new_floor, [asked])
    plain = criterion.accept(plain, ids[: len(ids) - n])
    assert (state.text, state.marks[-1]) == (plain.text, plain.marks[-1])
    assert criterion.pending_text(state) == criterion.pending_text(plain)
    state = criterion.accept(state, ids[:kept])
    plain = criterion.accept(plain, ids[:kept])
    assert criterion.check(state, [], ids) == criterion.check(plain, [], ids)
    assert (
        criterion.take_back(other, len(ids)).marks
        == criterion.start(new_floor().view(0, [0], stop_regexes=asked)).marks
    )


def test_a_match_that_begins_in_one_delta_and_ends_in_another(new_floor):
    criterion, state = started(new_floor, r"\n\n(?:User|Human):")
    left, shown, stop = generate(criterion, state, [list(b"Yes.\n"), list(b"\nUs"), list(b"e"), list(b"r: me")])
    assert (left, shown) == (b"Yes.", ["Yes.", "", "", ""])
    assert stop == Stop("stop_regex", 1, trim_text=7, matched="\n\nUser:")


def test_the_offset_is_exact_where_tokens_are_longer_than_the_match(new_floor):
    text = TokenBytes(["naïve ".encode(), "STOP42ü".encode() + b"\xf0\x9f"])
    criterion, state = started(new_floor, r"STOP\d", text)
    left, shown, stop = generate(criterion, state, [[0], [1]], text)
    assert (left.decode(), "".join(shown), stop.matched) == ("naïve ", "naïve ", "STOP4")
    assert stop.trim_text == len("STOP42ü".encode()) + 2


def test_what_cannot_match_any_more_is_let_go(new_floor):
    criterion, state = started(new_floor, [r"<\w+>", "x{3}"])
    held = []
    for token in b"a<b c<xx<xxx":
        state = criterion.accept(state, [token])
        held.append(criterion.pending_text(state))
    assert held == [0, 1, 2, 0, 0, 1, 2, 3, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", "no regular expression: missing"),
        ("a*", "matches the empty text"),
        ("$", "matches the empty text"),
        (r"a\Kb", "lookbehind"),
        (r"\Gb", "where a search starts"),
        ("(?r)ab", "backwards"),
        ("(?:ab){e<=1}", "approximately"),
        ("(?x) a b", "comments"),
        ("(?w)a", "far ahead"),
        ("(?>ab)c+?d", "one kind"),
    ],
)
def test_patterns_that_cannot_work_are_refused(pattern, words):
    with pytest.raises(ConfigError, match=words) as caught:
        SamplingConfig(stop_regexes=["ok", pattern])
    assert "\n" not in str(caught.value)
    assert SamplingConfig(stop_regexes=r"\\K").stop_regexes == (r"\\K",)


def test_a_search_that_takes_too_long_ends_its_branch(new_floor, monkeypatch):
    monkeypatch.setattr(stop_regexes, "TIME_LIMIT", 0.02)
    criterion, state = started(new_floor, "(a|aa)+c")
    with pytest.raises(BranchError, match="took more than 0.02 s"):
        criterion.check(state, [], list(b"a" * 40 + b"!"))


def test_an_engine_without_a_tokenizer(new_floor):
    with pytest.raises(ConfigError, match="no tokenizer"):
        started(new_floor, ["x"], text=None)
