"""An engine's vocabulary as llguidance takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from llguidance import LLTokenizer, TokenizerWrapper

from trtllm_core.plugin import DecodingContext

_PLAIN = r'[^"\\\x00-\x1F\x7F]'
SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_PLAIN}{times}" for times in ("{1,10}", "{1,15}", "{1,30}", "+"))]
"""Tokens that are sorted apart, with a mask of each part: where a string in JSON may still be 15 characters long, the
masks of the parts up to 15 are taken as they are. Those of llguidance have no 15; more of them cost shorter strings."""


class Vocabulary:
    """The tokens of an engine, and behind them one that is no token: the end of a text.

    Which tokens end a text is each request's own to say, so llguidance is told of an end that nobody can choose, and
    the processor puts the request's in its place.

    Args:
        pieces: the bytes of each token; special tokens have none.
        encode: the tokens of a text, as the tokenizer writes it.
    """

    def __init__(self, pieces: Sequence[bytes], encode: Callable[[str], Sequence[int]] | None) -> None:
        self.pieces = pieces
        self.end = len(pieces)
        self._encode = encode

    @classmethod
    def of(cls, context: DecodingContext) -> Vocabulary:
        """That of a session, whose engine has a tokenizer."""
        assert context.vocabulary is not None
        return cls(tuple(context.vocabulary[: context.vocab_size]), context.encode)

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """Made when first needed: it sorts the whole vocabulary into a tree."""
        return LLTokenizer(TokenizerWrapper(_Source(self)), n_vocab=self.end + 1, slices=SLICES)

    @property
    def words(self) -> int:
        """int32 words of a mask, the end's bit included."""
        return self.end // 32 + 1

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text that must come next, as the tokenizer would write it.

        Its way is taken only where it means exactly this text: some add a blank in front, and some read the names of
        special tokens in it. Otherwise the longest token that fits comes first.
        """
        data = text.encode()
        if self._encode is not None:
            found = list(self._encode(text))
            if b"".join(self.pieces[token] for token in found if token < self.end) == data:
                return found
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        found, at = [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            token = next((t for size in sizes if (t := self._ids.get(data[at : at + size])) is not None), None)
            if token is None:
                break  # a vocabulary without this byte: what comes before it is all that can be said
            found.append(token)
            at += len(self.pieces[token])
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: token for token, piece in enumerate(self.pieces) if piece}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


class _Source:
    """What ``TokenizerWrapper`` asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.end
        self.special_token_ids = [vocabulary.end]
        self.tokens = [*vocabulary.pieces, b"\xff<end>"]  # llguidance marks what is no text with this byte

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.tokens(text)
