"""Word lists in the form that the classic runtime's tensors had."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from trtllm_core.config.words import words_of
from trtllm_core.errors import ConfigError

Word = tuple[int, ...]


def to_word_list_format(
    word_dict: Sequence[Sequence[str | bytes | Sequence[int]]], tokenizer: Any = None, add_special_tokens: bool = False
) -> np.ndarray:
    """Stop or bad words as one array.

    Args:
        word_dict: for each request its words: either one string of comma-separated words (CSV: a word that holds a
            comma is quoted), or any number of token sequences.
        tokenizer: encodes the strings; anything with ``encode``. A word is encoded on its own, so ``"stop"`` and
            ``" stop"`` are different tokens.
        add_special_tokens: whether ``tokenizer`` puts special tokens around a word.

    Returns:
        int32 ``[batch, 2, L]``: ``[b, 0]`` the tokens of all words of a request, padded with 0; ``[b, 1]`` where each
        word ends in it, padded with -1. Words without tokens are left out.

    Raises:
        ConfigError: a request's words are neither, or are a string and there is no tokenizer.
    """
    batch = [[word for word in _words(row, tokenizer, add_special_tokens) if word] for row in word_dict]
    width = max([1, *(sum(map(len, words)) for words in batch)])
    result = np.zeros((len(batch), 2, width), np.int32)
    result[:, 1] = -1
    for row, words in zip(result, batch, strict=True):
        ends = list(accumulate(map(len, words)))
        row[0, : sum(map(len, words))] = [token for word in words for token in word]
        row[1, : len(ends)] = ends
    return result


def from_word_list_format(array: Any) -> list[list[Word]]:
    """The words of each request, from what ``to_word_list_format`` makes.

    Args:
        array: integers ``[batch, 2, L]``, of NumPy or torch on the CPU.

    Raises:
        ConfigError: the array is not of this form.
    """
    array = np.asarray(array)
    if array.ndim != 3 or array.shape[1] != 2:
        raise ConfigError(f"a word list has the shape [batch, 2, length], not {list(array.shape)}")
    return words_of(array.tolist())


def _words(row: Sequence[str | bytes | Sequence[int]], tokenizer: Any, add_special: bool) -> list[Word]:
    strings = [item.decode() if isinstance(item, bytes) else item for item in row if isinstance(item, (str, bytes))]
    if not strings:
        return [tuple(int(token) for token in item) for item in row]
    if len(row) != 1:
        raise ConfigError(f"a request's words are one string, separated by commas, not {len(row)} items: {list(row)!r}")
    if tokenizer is None:
        raise ConfigError(f"words given as text need a tokenizer: {strings[0]!r}")
    return [_encode(tokenizer, word, add_special) for line in csv.reader(strings) for word in line]


def _encode(tokenizer: Any, word: str, add_special: bool) -> Word:
    """With our tokenizer (``files``), one of ``transformers`` (gives ids) or of ``tokenizers`` (gives an Encoding)."""
    keyword = "add_special" if hasattr(tokenizer, "files") else "add_special_tokens"
    encoded = tokenizer.encode(word, **{keyword: add_special})
    return tuple(getattr(encoded, "ids", encoded))
