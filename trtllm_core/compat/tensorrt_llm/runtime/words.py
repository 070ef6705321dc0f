"""Stop and bad words, in the two forms that scripts used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_core.decoding.words import to_word_list_format
from trtllm_core.errors import ConfigError

__all__ = ["decode_words_list", "to_word_list_format"]


def decode_words_list(
    word_dict: Sequence[Sequence[str | bytes]], tokenizer: Any = None, add_special_tokens: bool = False
) -> list[list[list[int]]]:
    """The words of each request as token ids. Each string is one word; those without tokens are left out.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("decode_words_list needs a tokenizer")
    texts = [[word.decode() if isinstance(word, bytes) else word for word in row] for row in word_dict]
    encoded = [[tokenizer.encode(word, add_special_tokens=add_special_tokens) for word in row] for row in texts]
    return [[list(ids) for ids in row if len(ids)] for row in encoded]
