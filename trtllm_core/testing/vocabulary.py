"""Tokenizers made up for tests and measurements: byte-level, of any size, with an end token."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from trtllm_core.checkpoint import SpecialTokens, Tokenizer, TokenizerFiles
from trtllm_core.decoding.detokenizer import BYTE_LEVEL

END = "<|end|>"
# What tokens of a trained vocabulary look like: words with and without their space, code, digits, other alphabets.
_ALPHABETS = (
    "etaoinshrdlucmfwypvbgkjqxz",
    "ETAOINSHRDLUCMFWYPVBGKJQXZ",
    "0123456789",
    "_-.,:;()[]{}<>/\\\"'=+*&|!?#@$%^~`",
    "éèüöäßñçåøœ",
    "авекмнорстухиый",
    "的一是不了人我在有他这中",
)
_WEIGHTS = (70, 8, 5, 8, 3, 4, 2)
_CHARACTERS = {byte: character for character, byte in BYTE_LEVEL.items()}


def byte_tokenizer(pieces: Sequence[str] = (), end: str = END) -> Tokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes, 256 the special token ``end``, and the rest ``pieces``."""
    vocab = {_written(bytes([byte])): byte for byte in range(256)} | {end: 256}
    vocab |= {_written(piece.encode()): 257 + i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([end])
    return Tokenizer(TokenizerFiles(backend.to_str(), None, SpecialTokens(eos_ids=(256,), eos_token=end)))


def synthetic_tokenizer(size: int, seed: int = 0) -> Tokenizer:
    """As ``byte_tokenizer``, filled up to ``size`` tokens with pieces as a trained vocabulary has them.

    Args:
        size: at least 257.
        seed: the same one makes the same tokenizer.
    """
    draw = random.Random(seed)
    pieces: dict[str, None] = {}
    while len(pieces) < size - 257:
        (letters,) = draw.choices(_ALPHABETS, _WEIGHTS)
        # Short tokens are frequent letters and few, long ones are many: lengths as in a vocabulary of 128 thousand.
        count = min(16, max(1, round(draw.lognormvariate(1.6, 0.45))))
        weights = [1 / (rank + 1) for rank in range(len(letters))]
        word = "".join(draw.choices(letters, weights, k=count))
        piece = (" " if draw.random() < 0.45 else "") + word
        if len(piece.encode()) > 1:
            pieces[piece] = None
    return byte_tokenizer(list(pieces))


def _written(data: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join(_CHARACTERS[byte] for byte in data)
