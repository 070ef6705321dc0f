"""Tokenizers rebuilt from GGUF metadata, against SentencePiece and against llama.cpp's rules written down in Python."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from trtllm_core.checkpoint import Tokenizer, TokenizerError
from trtllm_core.checkpoint.gguf_tokenizer import TokenKind, read_gguf_tokenizer
from trtllm_core.checkpoint.pretokenizer import PRE_TOKENIZERS

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and don't you forget 12345 of them!",
    "def main(argv):\n    for i in range(100):\n        print(i * 2)\n\n\treturn None\n",
    "Größe naïve café 日本語 Привет мир",
    "HelloWorld camelCase SHOUTING we'll I'VE they're   spaces\r\n\r\nlines",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two",
    "1234567 ½ ٣٤",
    "x\n\n\n  y ",
    "don't DON'T",
    "🙂 new",
    "a/b/c\n/d",
    "$$^^ (a) .,!",
]
# llama.cpp's own spelling of its patterns, which has no inline flags and no classes for upper and lower case.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_CPP: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],
}
# The two regex engines know different versions of Unicode, so leave newer characters out; and "ſ", which the models'
# own (?i:'s) takes for an s, while llama.cpp's spelling does not.
ASSIGNED = st.characters(exclude_categories=["Cn", "Cs", "Co"], exclude_characters="ſ")


def split(text: str, patterns: list[str]) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        cut = regex.compile(pattern)
        found = []
        for piece in pieces:
            at = 0
            for match in cut.finditer(piece):
                found += [piece[at : match.start()], match.group()]
                at = match.end()
            found.append(piece[at:])
        pieces = [piece for piece in found if piece]
    return pieces


@pytest.mark.parametrize("name", LLAMA_CPP)
@settings(max_examples=150, deadline=None)
@given(text=st.sampled_from(TEXTS) | st.text(ASSIGNED, max_size=30) | st.text("aB1½ \t\r\n'sé.,/(", max_size=30))
def test_words_like_llama_cpp(name: str, text: str) -> None:
    pre = PRE_TOKENIZERS[name]
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), behavior="isolated") for p in pre.patterns])
    assert [piece for piece, _ in cut.pre_tokenize_str(text)] == split(text, LLAMA_CPP[name])


def byte_level(pre: str | None, **extra: Any) -> dict[str, Any]:
    """The metadata of a small byte-level BPE trained with the words of ``pre``."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = PRE_TOKENIZERS[pre or "default"].build()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    added = {
        "<s>": TokenKind.CONTROL,
        "</s>": TokenKind.CONTROL,
        "<tool>": TokenKind.USER_DEFINED,
        "[PAD]": TokenKind.UNUSED,
    }
    ggml = {
        "model": "gpt2",
        "tokens": [*tokens, *added],
        "token_type": [*[1] * len(tokens), *map(int, added.values())],
        "merges": [" ".join(merge) for merge in state["merges"]],
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
        **({"pre": pre} if pre else {}),
        **extra,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}


def rebuild(metadata: dict[str, Any]) -> Tokenizer:
    files = read_gguf_tokenizer(metadata, Path("x.gguf"))
    assert files is not None
    return Tokenizer(files)


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, None])
def test_byte_level_round_trip(pre: str | None) -> None:
    tokenizer = rebuild(byte_level(pre))
    for text in TEXTS:
        marked = text + "<tool></s>" + text
        ids = tokenizer.encode(marked, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == marked
        assert tokenizer.decode(ids) == text + "<tool>" + text


def test_transformers_agrees_on_llama_bpe_and_qwen2(write_gguf: Any) -> None:
    transformers = pytest.importorskip("transformers")
    for pre in ("llama-bpe", "qwen2"):
        metadata = byte_level(pre, add_bos_token=False)
        path = write_gguf(metadata=metadata, name=f"{pre}.gguf")
        theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        ours = rebuild(metadata)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), (pre, text)


def test_bos_by_flag_and_by_default() -> None:
    assert rebuild(byte_level("smollm")).files.special.add_bos is False
    for metadata in (byte_level("llama-bpe"), byte_level("smollm", add_bos_token=True)):
        tokenizer = rebuild(metadata)
        assert tokenizer.files.special.add_bos
        assert tokenizer.encode("hi")[0] == tokenizer.bos_id
        assert tokenizer.bos_id not in tokenizer.encode("hi", add_special=False)
    assert rebuild(byte_level("llama-bpe", add_bos_token=False)).files.special.add_bos is False
    both = rebuild(byte_level("smollm", add_bos_token=True, add_eos_token=True))
    assert both.encode("") == [both.bos_id, both.eos_ids[0]]


def test_a_word_that_is_a_token_stays_one() -> None:
    metadata = byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"][-1] = "Ġzzyzx"
    metadata["tokenizer.ggml.token_type"][-1] = 1
    assert len(rebuild(metadata).encode(" zzyzx", add_special=False)) == 1
    metadata["tokenizer.ggml.pre"] = "dbrx"
    assert len(rebuild(metadata).encode(" zzyzx", add_special=False)) > 1


def test_ends_of_a_turn() -> None:
    metadata = byte_level("llama-bpe")
    first = metadata["tokenizer.ggml.bos_token_id"]
    metadata["tokenizer.ggml.tokens"] += ["<|eot_id|>", "<|eom|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    metadata["tokenizer.ggml.eom_token_id"] = first + 5
    metadata["tokenizer.chat_template"] = "{{ bos_token }}"
    tokenizer = rebuild(metadata)
    assert tokenizer.eos_ids == (first + 1, first + 5, first + 4)
    assert tokenizer.apply_chat_template([]) == "<s>"


def test_no_tokenizer() -> None:
    assert read_gguf_tokenizer({}, Path("x")) is None
    assert read_gguf_tokenizer({"tokenizer.ggml.model": "no_vocab"}, Path("x")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, "of the kind 'rwkv'"),
        ({"pre": "future-bpe"}, "by the rules 'future-bpe', which are not known here"),
        ({"merges": ["q zzz"]}, "damaged tokenizer"),
        ({"token_type": [1]}, "with 1 types"),
        ({"model": "llama"}, "without scores"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        rebuild({**byte_level("smollm"), **{f"tokenizer.ggml.{key}": value for key, value in change.items()}})


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def piece(request: pytest.FixtureRequest) -> Any:
    """A SentencePiece BPE model with byte fallback, as LLaMA's is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), request.param


def spm_metadata(piece: Any) -> dict[str, Any]:
    processor, prefix = piece

    def kind(number: int) -> TokenKind:
        if processor.IsControl(number):
            return TokenKind.CONTROL
        if processor.IsUnknown(number):
            return TokenKind.UNKNOWN
        return TokenKind.BYTE if processor.IsByte(number) else TokenKind.NORMAL

    numbers = range(processor.GetPieceSize())
    ggml = {
        "model": "llama",
        "tokens": [processor.IdToPiece(number) for number in numbers],
        "scores": [processor.GetScore(number) for number in numbers],
        "token_type": [int(kind(number)) for number in numbers],
        "add_space_prefix": prefix,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in ggml.items()}


def test_like_sentencepiece(piece: Any) -> None:
    tokenizer, (processor, _) = rebuild(spm_metadata(piece)), piece
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.files.special.add_bos) == (1, (2,), True)

    @settings(max_examples=300, deadline=None)
    @given(text=st.sampled_from(TEXTS) | st.text(max_size=30) | st.text("the quickdn 12\n日é", max_size=40))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special=False)
        # SentencePiece takes its own mark for a space and drops NUL; a file's tokenizer cannot tell.
        if "▁" not in text and "\0" not in text:
            assert ids == processor.EncodeAsIds(text)
            assert tokenizer.encode(text) == [1, *ids]
            assert tokenizer.decode(ids) == text

    check()


def test_each_stretch_between_special_tokens_is_prefixed(piece: Any) -> None:
    tokenizer, (processor, _) = rebuild(spm_metadata(piece)), piece
    expected = [*processor.EncodeAsIds("the"), 2, *processor.EncodeAsIds("dog")]
    assert tokenizer.encode("the</s>dog", add_special=False) == expected
