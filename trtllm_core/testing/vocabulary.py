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
_SHARES = (76, 7, 2, 9, 2, 3, 2)
_ADDED = (30, 40, 30)  # how often a token is a shorter one with one, two or three letters more
_CHARACTERS = {byte: character for character, byte in BYTE_LEVEL.items()}


def byte_tokenizer(pieces: Sequence[str] = (), end: str = END) -> Tokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes, 256 the special token ``end``, and the rest ``pieces``."""
    vocab = {_written(bytes([byte])): byte for byte in range(256)} | {end: 256}
    vocab |= {_written(piece.encode()): 257 + i for i, piece in enumerate(pieces)}
    if len(vocab) != 257 + len(pieces):
        raise ValueError("pieces are of two bytes and more, and no two of them alike")
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([end])
    return Tokenizer(TokenizerFiles(backend.to_str(), None, SpecialTokens(eos_ids=(256,), eos_token=end)))


def synthetic_tokenizer(size: int, seed: int = 0) -> Tokenizer:
    """As ``byte_tokenizer``, filled up to ``size`` tokens with pieces as a trained vocabulary has them.

    Lengths, and how many beginnings the tokens share, are about those of SmolLM2's vocabulary: what a grammar's masks
    cost depends on them.

    Args:
        size: at least 257.
        seed: the same one makes the same tokenizer.
    """
    draw = random.Random(seed)
    stems: list[dict[int, list[str]]] = [{1: [*letters, *(" " + c for c in letters)]} for letters in _ALPHABETS]
    chances = [[1 / rank for rank in range(1, len(letters) + 1)] for letters in _ALPHABETS]
    pieces: dict[str, None] = {}
    while len(pieces) < size - 257:
        (kind,) = draw.choices(range(len(_ALPHABETS)), _SHARES)
        length = min(14, max(2, round(draw.lognormvariate(1.75, 0.42))))
        (added,) = draw.choices((1, 2, 3), _ADDED)
        known = stems[kind].get(max(1, length - added))
        if known:
            stem = draw.choice(known)
            rest = length - max(1, length - added)
            piece = stem + "".join(draw.choices(_ALPHABETS[kind], chances[kind], k=rest))
            if piece not in pieces:
                pieces[piece] = None
                stems[kind].setdefault(length, []).append(piece)
    return byte_tokenizer(list(pieces))


def _written(data: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join(_CHARACTERS[byte] for byte in data)
