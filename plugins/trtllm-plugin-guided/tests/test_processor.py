"""The processor against a plain reference, and at the edges: ends, drafts, dead ends, vocabularies as they come."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core import ModelRunner, SamplingConfig, use
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.decoding.host import HostProcessorAdapter
from trtllm_core.errors import BranchError
from trtllm_core.plugin import HostLogitsProcessor, Phase
from trtllm_core.testing.floor import Floor
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import byte_tokenizer
from trtllm_plugin_guided.grammar import GuidedParams
from trtllm_plugin_guided.processor import Guided
from trtllm_plugin_guided.vocabulary import Vocabulary

PIECES = ["ab", "ba", "abc", "12", "é", "é1", "aa", "a1", "a-", "--"]
TOKENIZER = byte_tokenizer([*PIECES, "😀"])
TABLE = TokenBytes.of(TOKENIZER)
END = 256


def begun(params: dict[str, Any], pieces: TokenBytes = TABLE, end_ids: tuple[int, ...] = (END,), **sizes: int) -> Any:
    """A processor, the state of a branch that it begins, and the floor that it stands on."""
    floor = Floor(text=pieces, **{"vocab_size": len(pieces), **sizes})
    processor = Guided()
    processor.setup(floor.context)
    return processor, processor.start(floor.begin(0, [1], SamplingConfig(), GuidedParams(**params), end_ids)), floor


def allowed(processor: Guided, state: Any, width: int) -> list[int]:
    """Tokens that the mask allows, of ``width``."""
    words = np.full(-(-width // 32), -1, np.int32)
    assert processor.mask(state, [], words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.nonzero(bits)[0].tolist()


PATTERNS = (r"[ab1-]{1,6}", r"(ab|ba|12)*é?", r"a?(b|c)+1{2,3}", r"[^a]*", "(😀|é|a)-?", r"[0-9a-f-]{3,}")


@given(st.sampled_from(PATTERNS), st.integers(0, 2**31), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_masks_against_partial_matches_of_the_pattern(pattern: str, seed: int, length: int) -> None:
    draw = random.Random(seed)
    processor, state, _ = begun({"regex": pattern})
    text = b""
    for _ in range(length + 1):
        found = allowed(processor, state, len(TABLE))
        due = {token for token, piece in enumerate(TABLE.pieces) if piece and may_go_on(pattern, text + piece)}
        may_end = regex.fullmatch(pattern, text.decode(errors="replace")) is not None and whole(text)
        assert set(found) <= due | {END}
        assert (END in found) == may_end
        if due and not processor.forced(state):  # of what must come next the tokenizer's own way is taken
            assert {TABLE.pieces[token] for token in due} == {TABLE.pieces[token] for token in found} - {b""}
        choices = [token for token in found if token != END]
        if not choices:
            break
        token = draw.choice(choices)
        state = processor.accept(state, [token])
        text += TABLE.pieces[token]


def whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def may_go_on(pattern: str, data: bytes) -> bool:
    """Whether some text that begins with ``data`` matches: the last character may be cut off."""
    for cut in range(4):
        head, rest = data[: len(data) - cut], data[len(data) - cut :]
        if whole(head):
            ends = [end for end in ENDS if whole(rest + end)] if rest else [b""]
            texts = (head.decode() + (rest + end).decode() for end in ends)
            return any(regex.fullmatch(pattern, text, partial=True) for text in texts)
    return False


ENDS = [c.encode()[i:] for c in "é😀" for i in range(1, len(c.encode()))]
ENDS += [bytes(end) for n in (1, 2, 3) for end in itertools.product((0x80, 0x90, 0xA0), repeat=n)]
"""Bytes that may complete a character: those of the patterns, and some of others."""


def test_end_tokens_are_those_of_the_request_and_stand_where_the_grammar_may_end() -> None:
    processor, state, _ = begun({"regex": "ab?"}, end_ids=(END, ord("x"), 31))  # 31 is the bit of the sign
    assert allowed(processor, state, len(TABLE)) == [ord("a"), 257]
    state = processor.accept(state, [ord("a")])
    assert allowed(processor, state, len(TABLE)) == [31, ord("b"), ord("x"), END]
    state = processor.accept(state, [ord("x")])
    assert processor.forced(state) == ()
    assert processor.mask(state, [], np.zeros(9, np.int32)) is False, "behind an end nothing is chosen"
    state = processor.accept(state, [7, 8])
    state = processor.take_back(state, 3)
    assert allowed(processor, state, len(TABLE)) == [31, ord("b"), ord("x"), END]
    state = processor.take_back(processor.accept(state, [ord("b"), END]), 3)
    assert allowed(processor, state, len(TABLE)) == [ord("a"), 257]


def test_an_end_token_that_has_a_text_is_an_end_alone() -> None:
    processor, state, _ = begun({"regex": "[ab]{2}"}, end_ids=(ord("a"),))
    assert ord("a") not in allowed(processor, state, len(TABLE))
    state = processor.accept(state, [ord("b"), ord("b")])
    assert allowed(processor, state, len(TABLE)) == [ord("a")]


def test_tokens_of_one_text_are_all_allowed_or_none() -> None:
    pieces = TokenBytes([b"a", b"b", b"a", b"ab", b"", b"a"])
    processor, state, _ = begun({"regex": "[ab]+"}, pieces, end_ids=(4,), vocab_size=6)
    assert allowed(processor, state, 6) == [0, 1, 2, 3, 5]
    assert allowed(processor, processor.accept(state, [2, 5]), 6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 63, 64, 97])
def test_ids_without_a_token_and_padding_are_forbidden(vocab_size: int) -> None:
    pieces = TokenBytes([bytes([65 + i]) for i in range(31)])
    processor, state, _ = begun({"regex": "."}, pieces, end_ids=(0,), vocab_size=vocab_size, padding=7)
    assert allowed(processor, state, vocab_size + 7) == list(range(1, 31))


def test_a_vocabulary_longer_than_the_logits_is_cut() -> None:
    processor, state, _ = begun({"regex": ".{2}"}, vocab_size=100, end_ids=(3,))
    assert max(allowed(processor, state, 104)) == 99


def test_what_must_come_is_written_as_the_tokenizer_writes_it() -> None:
    processor, state, _ = begun({"json_schema": {"const": {"name": "x"}}})
    assert TABLE(processor.forced(state)) == b'{"name": "x"}'
    state = processor.accept(state, processor.forced(state))
    assert processor.forced(state) == (END,)
    assert processor.forced(processor.accept(state, [END])) == ()
    processor, state, _ = begun({"regex": "(a|b)c"})
    assert list(processor.forced(state)) == []
    assert list(processor.forced(processor.accept(state, [ord("a")]))) == [ord("c")]


def test_names_of_special_tokens_in_a_text_are_plain_text() -> None:
    """The tokenizer would read the end token in it."""
    assert TOKENIZER.encode("<|end|>") == [END]
    processor, state, _ = begun({"json_schema": {"const": "ab<|end|>é"}})
    forced = processor.forced(state)
    assert END not in forced
    assert TABLE(forced) == '"ab<|end|>é"'.encode()
    assert 257 in forced, "the longest token that fits"
    assert Vocabulary([b"a", b"b"], None).tokens("abxa") == [0, 1]


def test_a_token_that_does_not_fit_fails_its_branch() -> None:
    processor, state, _ = begun({"regex": "ab"})
    with pytest.raises(BranchError, match="token 120 does not fit"):
        processor.accept(state, [ord("x")])
    assert allowed(processor, state, len(TABLE)) == [ord("a")], "the state is as it was"


def test_masks_of_drafts_are_those_of_the_text_with_them() -> None:
    processor, _, floor = begun({"regex": "[ab]{3}1?"})
    adapter = HostProcessorAdapter(processor, floor.history)
    adapter.setup(floor.context)
    view = floor.begin(0, [1], SamplingConfig(), GuidedParams(regex="[ab]{3}1?"), (END,))
    adapter.begin(0, view)
    a, b, one, ab = ord("a"), ord("b"), ord("1"), 257
    for draft in ([a, ab, END, 5], [b, one, a, a], [ab, b, one, END]):
        logits = torch.zeros(5, floor.context.vocab_size_padded)
        adapter.apply(logits, floor.positions([0] * 5, offsets=range(5), drafts={0: draft}))
        fits = True
        for offset, row in enumerate(logits):
            found = [t for t in (row == 0).nonzero().flatten().tolist() if t < len(TABLE)]
            if not fits or (offset and draft[offset - 1] == END):
                assert len(found) == len(TABLE), "nobody will choose here"
                fits = False
                continue
            text = TABLE(draft[:offset]).decode()
            texts = {TABLE.pieces[t].decode() for t in found if t != END}
            assert all(regex.fullmatch("[ab]{3}1?", text + t, partial=True) for t in texts)
            assert (END in found) == bool(regex.fullmatch("[ab]{3}1?", text))
            fits = offset == 4 or draft[offset] in found
    assert adapter.take_failed() == {}


class Overrules(HostLogitsProcessor):
    """Wants the letter x, whatever anybody says."""

    phase = Phase.TRUNCATION

    def process(self, state: Any, tokens: Any, logits: torch.Tensor) -> None:
        logits.fill_(-1.0)[ord("x")] = 1.0


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(TOKENIZER.vocab_size), tokenizer=TOKENIZER)


def test_what_overrules_a_mask_fails_one_request(runner: ModelRunner) -> None:
    config = SamplingConfig(max_new_tokens=6, return_dict=True)
    asked = [config.replace(logits_processors=use("guided", regex=pattern)) for pattern in ("[xy]{2}", "[ab]{2}")]
    outputs = runner.generate([[1], [1]], asked, logits_processor=Overrules(), text=True)["outputs"]
    assert outputs[1].finish_reason == "plugin_error"
    assert "'guided': token 120 does not fit the grammar" in str(outputs[1].error)
    assert outputs[0].tokens[:2] == (ord("x"), ord("x")), "the other one went on"


def test_a_grammar_that_no_token_fits_fails_its_request() -> None:
    engine = MarkovExecutable(6)
    tokenizer = byte_tokenizer()
    runner = ModelRunner.from_engine(engine, tokenizer=tokenizer)  # six logits: the first bytes alone
    config = SamplingConfig(max_new_tokens=6, end_id=5, return_dict=True)
    patterns = ("a", "\\x01\\x02", "\\x05")  # the last begins with what is this request's end
    asked = [config.replace(logits_processors=use("guided", regex=pattern)) for pattern in patterns]
    outputs = runner.generate([[1]] * 3, asked)["outputs"]
    assert [output.finish_reason for output in outputs] == ["plugin_error", "end_id", "plugin_error"]
    assert outputs[1].tokens == (1, 2, 5)
    for output in (outputs[0], outputs[2]):
        assert str(output.error) == "plugin 'guided': no token of the vocabulary fits the grammar here"


def test_a_minimum_length_does_not_keep_a_finished_text_from_ending(runner: ModelRunner) -> None:
    config = SamplingConfig(max_new_tokens=9, min_length=8, return_dict=True)
    wish = config.replace(logits_processors=use("guided", regex="ab"))
    output = runner.generate([[1]], wish, text=True)["outputs"][0]
    assert (output.finish_reason, output.text) == ("end_id", "ab")


def test_compiled_grammars_are_kept_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtllm_plugin_guided.processor.KEPT", 2)
    processor, state, floor = begun({"regex": "a"})
    first = next(iter(processor._compiled.values()))
    for pattern in ("b", "a", "c"):
        view = floor.begin(1, [1], SamplingConfig(), GuidedParams(regex=pattern), (END,))
        other = processor.start(view)
        assert other.matcher is not first
    assert [found is first for found in processor._compiled.values()] == [True, False]
    processor.accept(state, [ord("a")])
    assert not first.is_stopped(), "what is kept never moves"
