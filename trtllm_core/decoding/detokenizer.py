"""Tokens to bytes and to text, piece by piece, without ever showing half a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

    from trtllm_core.checkpoint import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_BORDER = "\u2581"


class TokenBytes:
    """The bytes of each token of a vocabulary, so that the text of tokens is their bytes joined.

    Special tokens, and ids outside the vocabulary, have none. An object is what ``DecodingContext.text`` holds.

    Args:
        pieces: the bytes of each token, by id.
        encode: text to ids, with nothing around it; None where nobody can.
    """

    def __init__(self, pieces: Sequence[bytes], encode: Callable[[str], Sequence[int]] | None = None) -> None:
        self.pieces = tuple(pieces)
        """The bytes of each token, by id."""
        self.encode = encode

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer | Tokenizer) -> TokenBytes:
        """Made of a tokenizer: one of the ``tokenizers`` library, or one of an engine.

        Raises:
            ConfigError: its tokens have no bytes of their own (WordPiece, for one).
        """
        text = tokenizer.files.tokenizer_json if hasattr(tokenizer, "files") else tokenizer.to_str()
        spec = json.loads(text)
        to_bytes = _converter(spec)
        pieces = {id_: to_bytes(token) for token, id_ in _vocabulary(spec["model"])}
        for token in spec.get("added_tokens") or ():
            pieces[token["id"]] = b"" if token["special"] else to_bytes(token["content"])
        return cls([pieces.get(id_, b"") for id_ in range(max(pieces, default=-1) + 1)], _encoder(tokenizer))

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens, which need not be whole characters."""
        pieces = self.pieces
        return b"".join([pieces[id_] for id_ in ids if 0 <= id_ < len(pieces)])


class TextStream:
    """The text of one branch as its tokens come. It gives out whole characters only.

    Args:
        token_bytes: of the engine's vocabulary.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._data = bytearray()
        self._ends: list[int] = []
        self._emitted = 0

    @property
    def data(self) -> bytes:
        """All bytes so far."""
        return bytes(self._data)

    @property
    def emitted(self) -> int:
        """How many of the bytes were given out."""
        return self._emitted

    def push(self, ids: Sequence[int], hold: int = 0) -> str:
        """Add tokens.

        Args:
            ids: the tokens, which may be none.
            hold: bytes at the end to keep back, as ``HostStoppingCriterion.pending_text`` says.

        Returns:
            The text that has become certain. Bytes that can be no UTF-8 become U+FFFD.
        """
        self._add(ids)
        return self._emit(len(self._data) - hold, final=False)

    def finish(self, ids: Sequence[int] = (), trim: int = 0) -> str:
        """Add the last tokens.

        Args:
            ids: the tokens, which may be none.
            trim: bytes to drop from the end, as ``Stop.trim_text`` says.

        Returns:
            The rest of the text.
        """
        self._add(ids)
        del self._data[len(self._data) - trim :]
        return self._emit(len(self._data), final=True)

    def rewind(self, n: int) -> int:
        """Take the last ``n`` tokens back.

        Returns:
            How many bytes were given out that should not have been.
        """
        keep = len(self._ends) - n
        del self._ends[keep:]
        del self._data[self._ends[-1] if self._ends else 0 :]
        overrun = max(0, self._emitted - len(self._data))
        self._emitted -= overrun
        return overrun

    def fork(self) -> TextStream:
        """An independent copy."""
        copy = TextStream(self._token_bytes)
        copy._data, copy._ends, copy._emitted = self._data.copy(), self._ends.copy(), self._emitted
        return copy

    def _add(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            self._data += self._token_bytes((id_,))
            self._ends.append(len(self._data))

    def _emit(self, end: int, final: bool) -> str:
        text, used = codecs.utf_8_decode(self._data[self._emitted : max(end, self._emitted)], "replace", final)
        self._emitted += used
        return text


def _encoder(tokenizer: tokenizers.Tokenizer | Tokenizer) -> Callable[[str], Sequence[int]]:
    given: Any = tokenizer
    if hasattr(given, "files"):
        return lambda text: given.encode(text, add_special=False)
    return lambda text: given.encode(text, add_special_tokens=False).ids


def _vocabulary(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        yield from vocab.items()
    else:  # Unigram: (token, score), the id is the place
        yield from ((token, id_) for id_, (token, _) in enumerate(vocab))


def _converter(spec: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How a tokenizer's decoder turns one token into bytes."""
    decoder = spec.get("decoder") or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    if "ByteLevel" in steps:
        return _byte_level
    if "Metaspace" in steps:
        border = steps["Metaspace"].get("replacement", _WORD_BORDER)
        return lambda token: _sentencepiece(token, border)
    if "ByteFallback" in steps or "Replace" in steps:
        return lambda token: _sentencepiece(token, _WORD_BORDER)
    raise ConfigError(f"tokenizer: the bytes of single tokens are unknown for the decoder {decoder.get('type')!r}")


def _sentencepiece(token: str, border: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(border, " ").encode()


def _byte_level(token: str) -> bytes:
    """Byte-level BPE writes each byte as one printable character; what is no such writing stands for itself."""
    try:
        return bytes([BYTE_LEVEL[character] for character in token])
    except KeyError:
        return token.encode()


def _printable_bytes() -> dict[str, int]:
    """Character → byte: printable Latin-1 stands for itself, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _printable_bytes()
"""Character → byte, of byte-level vocabularies."""
