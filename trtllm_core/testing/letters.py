"""A tokenizer whose tokens are a few letters each, so that one text can come in many ways of tokens."""

from __future__ import annotations

import functools
import itertools
import string

import tokenizers
from tokenizers import decoders, models

from trtllm_core.checkpoint.tokenizer import SpecialTokens, Tokenizer, TokenizerFiles


def pieces(count: int) -> list[str]:
    """``count`` different strings of letters: all single letters first, then all pairs, and so on."""
    letters = string.ascii_lowercase[:8]
    words = ("".join(word) for size in itertools.count(1) for word in itertools.product(letters, repeat=size))
    return list(itertools.islice(words, count))


@functools.lru_cache(maxsize=8)
def letter_tokenizer(vocab_size: int, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """A tokenizer of ``vocab_size`` tokens: ``a`` is 0, ``h`` 7, ``aa`` 8. It encodes no text, but decodes all ids."""
    vocab = {piece: token for token, piece in enumerate(pieces(vocab_size))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(TokenizerFiles(backend.to_str(), None, SpecialTokens(eos_ids=eos_ids)))
