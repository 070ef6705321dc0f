"""Word lists in the classic form."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from trtllm_core.decoding.words import from_word_list_format, to_word_list_format
from trtllm_core.errors import ConfigError

ids = st.integers(0, 2**31 - 1)


class Transformers:
    """``encode`` as ``transformers`` has it."""

    def encode(self, text, add_special_tokens):
        return [1] * add_special_tokens + [ord(character) for character in text]


class Ours(Transformers):
    """``encode`` as ``trtllm_core.checkpoint.Tokenizer`` has it."""

    files = None

    def encode(self, text, add_special=True):
        return super().encode(text, add_special)


def test_golden():
    array = to_word_list_format([[[5, 7, 3], [9, 2], [6, 2, 4, 1]], [[8]]])
    assert array.dtype == np.int32
    assert array.tolist() == [
        [[5, 7, 3, 9, 2, 6, 2, 4, 1], [3, 5, 9, -1, -1, -1, -1, -1, -1]],
        [[8, 0, 0, 0, 0, 0, 0, 0, 0], [1, -1, -1, -1, -1, -1, -1, -1, -1]],
    ]


@pytest.mark.parametrize("tokenizer", [Transformers(), Ours()])
def test_text(tokenizer):
    array = to_word_list_format([['ab,"c,d",,e'], [b"x"], []], tokenizer)
    assert from_word_list_format(array) == [[(97, 98), (99, 44, 100), (101,)], [(120,)], []]
    assert to_word_list_format([["a"]], tokenizer, add_special_tokens=True)[0, 0].tolist() == [1, 97]


def test_text_with_the_tokenizers_library():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"stop": 3, "now": 4, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert from_word_list_format(to_word_list_format([["stop now,stop"]], tokenizer)) == [[(3, 4), (3,)]]


def test_nothing():
    assert to_word_list_format([[], [[]]]).tolist() == [[[0], [-1]]] * 2
    assert to_word_list_format([]).shape == (0, 2, 1)


@given(st.lists(st.lists(st.lists(ids, min_size=1, max_size=4), max_size=4), max_size=4))
def test_round_trip(batch):
    assert from_word_list_format(to_word_list_format(batch)) == [[tuple(word) for word in row] for row in batch]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_word_list_format([["a"]]), "need a tokenizer"),
        (lambda: to_word_list_format([["a", "b"]], Transformers()), "one string, separated by commas"),
        (lambda: from_word_list_format(np.zeros((2, 3))), r"shape \[batch, 2, length\]"),
        (lambda: from_word_list_format(np.array([[[1, 2], [2, 1]]])), "must rise"),
        (lambda: from_word_list_format(np.array([[[1, 2], [3, -1]]])), "at most 2"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
