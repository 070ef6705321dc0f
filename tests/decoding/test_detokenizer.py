"""Tokens to bytes and to text."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from trtllm_core.checkpoint import Tokenizer, open_checkpoint
from trtllm_core.decoding.detokenizer import TextStream, TokenBytes
from trtllm_core.errors import ConfigError

TEXT = 'Grüße, 世界! 👩‍👩‍👧‍👦 naïve façade\n\t "quoted"  two spaces 🇩🇪 0123 <x> e\u0301 \x00\x7f end'


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT, "the cat sat on the mat " * 9], trainer)
    tokenizer.add_tokens(["<x>", " spaced word", "é"])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece():
    """A vocabulary as LLaMA's: word borders as U+2581, bytes as <0xNN>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁Gr", "e", "l", "o", "▁the", "he", "▁t", "h", "t", "G", "r", "ü", "▁G", ",", "!", "a", "▁▁"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "G"), ("▁G", "r"), ("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def streamed(token_bytes, ids):
    stream = TextStream(token_bytes)
    parts = [stream.push([id_]) for id_ in ids]
    parts.append(stream.finish())
    assert "\ufffd" not in "".join(parts[:-1])
    return "".join(parts)


def test_byte_level(byte_level):
    table = TokenBytes.of(byte_level)
    ids = byte_level.encode(TEXT).ids
    assert table(ids) == TEXT.encode()
    assert streamed(table, ids) == TEXT
    assert len(table) == byte_level.get_vocab_size()
    end = byte_level.token_to_id("<|end|>")
    assert table([end, *ids, end, 10**6, -1]) == TEXT.encode()


def test_byte_level_agrees_with_decode_on_any_ids(byte_level):
    table = TokenBytes.of(byte_level)

    @given(st.lists(st.integers(0, byte_level.get_vocab_size() - 1), max_size=12))
    @settings(max_examples=300, deadline=None)
    def check(ids):
        assert table(ids).decode("utf-8", "replace") == byte_level.decode(ids, skip_special_tokens=True)

    check()


def test_sentencepiece(sentencepiece):
    table = TokenBytes.of(sentencepiece)
    text = "Grüße,  the 👩‍👩‍👧 hello!"
    ids = sentencepiece.encode(text).ids
    assert any(3 <= id_ < 259 for id_ in ids), "some of it must be bytes"
    assert table(ids) == text.encode()
    assert streamed(table, ids) == text == sentencepiece.decode(ids)
    assert table([1, 2, 0]) == b""


def test_unigram_with_metaspace():
    vocab = [("<unk>", 0.0), ("▁", -2.0), ("▁he", -1.0), ("llo", -1.0), ("é", -1.5)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
    tokenizer.decoder = decoders.Metaspace()
    assert TokenBytes.of(tokenizer)([2, 3, 4, 2]) == " helloé he".encode()


def test_encoding_adds_nothing(byte_level, smollm2_gguf):
    assert TokenBytes.of(byte_level).encode("the cat") == byte_level.encode("the cat", add_special_tokens=False).ids
    files = open_checkpoint(smollm2_gguf).tokenizer()
    assert files is not None
    table = TokenBytes.of(Tokenizer(files))
    assert table(table.encode(TEXT)).decode() == TEXT
    assert TokenBytes([b"a"]).encode is None


def test_a_decoder_without_bytes_is_refused():
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        TokenBytes.of(tokenizer)


def test_stream_holds_back_and_forks_and_rewinds():
    table = TokenBytes([b"a", b"\xe2\x82", b"\xac", b"xyz", b"\xff"])
    stream = TextStream(table)
    assert stream.push([0, 1]) == "a"
    other = stream.fork()
    assert stream.push([2, 3], hold=2) == "€x"
    assert other.push([4]) == "\ufffd\ufffd"
    assert stream.push([], hold=2) == ""
    assert stream.rewind(1) == 1
    assert (stream.data, stream.emitted) == ("a€".encode(), 4)
    assert stream.finish([0, 3], trim=4) == ""
    assert stream.data == "a€".encode()
    assert other.finish([1]) == "\ufffd"


def test_real_tokenizer(smollm2_gguf):
    files = open_checkpoint(smollm2_gguf).tokenizer()
    assert files is not None
    tokenizer = Tokenizer(files)
    table = TokenBytes.of(tokenizer)
    ids = tokenizer.encode(TEXT * 3, add_special=False)
    assert table(ids).decode() == tokenizer.decode(ids) == TEXT * 3
    assert streamed(table, ids) == TEXT * 3
    assert len(table) == tokenizer.vocab_size
