"""The tokenizer in a GGUF file's metadata, rebuilt for the ``tokenizers`` library.

The metadata holds the vocabulary, the kind of each token, and merges ("gpt2": byte-level BPE) or scores ("llama":
SentencePiece BPE); how a text is prepared is implied by a name. Where the metadata leaves something out, llama.cpp's
default holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from trtllm_core.checkpoint.pretokenizer import PRE_TOKENIZERS, PreTokenizer
from trtllm_core.checkpoint.tokenizer import SpecialTokens, TokenizerError, TokenizerFiles, surround
from trtllm_core.errors import listing

_SPACE = "▁"
# Control tokens that end a turn. Many files name only the end of a text as their EOS, and would never stop a chat.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


class TokenKind(IntEnum):
    """The kinds of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Vocabulary:
    """The metadata's ``tokenizer.ggml.*`` entries, with llama.cpp's defaults."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.path = path
        self.tokens: Sequence[str] = self.get("tokens") or ()
        self.kinds: Sequence[int] = self.get("token_type") or [TokenKind.NORMAL] * len(self.tokens)
        if not self.tokens or len(self.kinds) != len(self.tokens):
            raise TokenizerError(
                f"{path} has a tokenizer of {len(self.tokens)} tokens with {len(self.kinds)} types: convert the model "
                "again."
            )
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def id(self, name: str, default: int | None = None) -> int | None:
        """The id under ``<name>_token_id``, if the vocabulary has it."""
        number = self.get(f"{name}_token_id", default)
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None

    def token(self, number: int | None) -> str | None:
        return None if number is None else self.tokens[number]

    def of_kind(self, *kinds: TokenKind) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if token and kind in kinds]


def read_gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> TokenizerFiles | None:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        metadata: the file's metadata.
        path: the file, for messages.

    Returns:
        The tokenizer; None if the file has none.

    Raises:
        TokenizerError: it has one of a kind, or with a pre-tokenizer, that is not known here, or a damaged one.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{path} has a tokenizer of the kind {kind!r}; known are 'gpt2' and 'llama'.")
    vocabulary = _Vocabulary(metadata, path)
    try:
        backend, special = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"{path} has a damaged tokenizer ({error}): convert the model again.") from None
    return TokenizerFiles(backend.to_str(), metadata.get("tokenizer.chat_template"), special)


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    pre = _pre_tokenizer(vocabulary)
    merges = [merge.partition(" ")[::2] for merge in vocabulary.get("merges", ())]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend, _finish(backend, vocabulary, add_bos=pre.add_bos)


def _pre_tokenizer(vocabulary: _Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{vocabulary.path} cuts texts into words by the rules {name!r}, which are not known here (known: "
            f"{listing(PRE_TOKENIZERS)})."
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    model = models.BPE(
        vocabulary.ids,
        _merges(vocabulary),
        unk_token=vocabulary.token(vocabulary.id("unknown", default=0)),
        fuse_unk=True,
        byte_fallback="<0x00>" in vocabulary.ids,
    )
    backend = tokenizers.Tokenizer(model)
    # A normalizer runs on each stretch between special tokens, and so prefixes each, which is what llama.cpp does.
    prefix = bool(vocabulary.get("add_space_prefix", True))
    spaces = [normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *spaces] if prefix else spaces)
    joins = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*joins, decoders.Strip(" ", 1, 0)] if prefix else joins)
    return backend, _finish(backend, vocabulary, add_bos=True, bos=1, eos=2)


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """All ways to make a token of two, best token first.

    SentencePiece merges the adjacent pair that makes the token of the highest score. Ranking pairs by the score of what
    they make has a BPE model choose the same.
    """
    ids, scores = vocabulary.ids, vocabulary.get("scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise TokenizerError(
            f"{vocabulary.path} has a SentencePiece tokenizer without scores: convert the model again."
        )
    ranked = []
    for token in vocabulary.of_kind(TokenKind.NORMAL):
        score = scores[ids[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _finish(
    backend: tokenizers.Tokenizer,
    vocabulary: _Vocabulary,
    add_bos: bool,
    bos: int | None = None,
    eos: int | None = None,
) -> SpecialTokens:
    """Add the special tokens to a tokenizer, and say which they are."""
    control = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    # add_tokens leaves those alone that are special already.
    defined = vocabulary.of_kind(TokenKind.USER_DEFINED)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])

    bos_id, eos_id = vocabulary.id("bos", bos), vocabulary.id("eos", eos)
    turn_ends = [vocabulary.ids[token] for token in _TURN_ENDS if token in control]
    ends = [eos_id, vocabulary.id("eot"), vocabulary.id("eom"), *turn_ends]
    bos_token, eos_token = vocabulary.token(bos_id), vocabulary.token(eos_id)
    adds_bos = bos_token is not None and bool(vocabulary.get("add_bos_token", add_bos))
    adds_eos = eos_token is not None and bool(vocabulary.get("add_eos_token", False))
    surround(backend, bos_token if adds_bos else None, eos_token if adds_eos else None)
    return SpecialTokens(
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(number for number in ends if number is not None)),
        pad_id=vocabulary.id("padding"),
        add_bos=adds_bos,
        bos_token=bos_token,
        eos_token=eos_token,
    )
