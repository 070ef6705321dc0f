"""Tokenizers of Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from trtllm_core.checkpoint import Tokenizer, TokenizerError, TokenizerFiles
from trtllm_core.checkpoint.hf_tokenizer import read_hf_tokenizer
from trtllm_core.errors import CheckpointError


def backend(adds_bos: bool = False) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>", "<end>"])  # 256 to 259
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return made


def files(path: Path, adds_bos: bool = False, **parts: Any) -> TokenizerFiles:
    (path / "tokenizer.json").write_text(backend(adds_bos).to_str())
    for name, content in parts.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    found = read_hf_tokenizer(path)
    assert found is not None
    return found


CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "pad_token": "<pad>",
}


def test_special_tokens_from_the_tokenizer(tmp_path: Path) -> None:
    special = files(tmp_path, tokenizer_config=CONFIG).special
    assert (special.bos_id, special.eos_ids, special.pad_id) == (256, (257,), 258)
    assert (special.bos_token, special.eos_token, special.add_bos) == ("<s>", "</s>", False)


def test_eos_in_order_of_precedence(tmp_path: Path) -> None:
    assert files(tmp_path, tokenizer_config=CONFIG, config={"eos_token_id": 259}).special.eos_ids == (259,)
    assert files(tmp_path, generation_config={"eos_token_id": [257, 259]}).special.eos_ids == (257, 259)
    assert files(tmp_path, generation_config={"eos_token_id": 7}).special.eos_ids == (7,)
    assert files(tmp_path, generation_config={"bos_token_id": 256}).special.eos_ids == (259,)


def test_ids_without_names(tmp_path: Path) -> None:
    special = files(tmp_path, config={"bos_token_id": 256, "eos_token_id": [257, 259], "pad_token_id": 258}).special
    assert (special.bos_id, special.pad_id, special.bos_token, special.eos_token) == (256, 258, "<s>", "</s>")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("flag", [True, False, None])
def test_bos_is_what_tokenizer_json_says(adds_bos: bool, flag: bool | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if flag is None else {"add_bos_token": flag}
    found = files(tmp_path, adds_bos, tokenizer_config=config)
    assert found.special.add_bos is adds_bos
    ids = Tokenizer(found).encode("ab")
    assert ids[:-2] == ([256] if adds_bos else [])
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path).encode("ab")
    assert Tokenizer(found).encode("ab", add_special=False) == ids[-2:]


def test_truncation_and_padding_of_the_training_are_dropped(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=16, pad_id=258, pad_token="<pad>")
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    found = read_hf_tokenizer(tmp_path)
    assert found is not None
    assert len(Tokenizer(found).encode("abcdef")) == 6


def test_chat_template(tmp_path: Path) -> None:
    assert files(tmp_path).chat_template is None
    assert files(tmp_path, tokenizer_config={"chat_template": "one"}).chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    assert files(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert files(tmp_path).chat_template == "three"


def test_none(tmp_path: Path) -> None:
    assert read_hf_tokenizer(tmp_path) is None


def test_sentencepiece_only(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="in tokenizer.model, not in tokenizer.json: convert"):
        read_hf_tokenizer(tmp_path)


def test_damaged(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="damaged"):
        read_hf_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        files(tmp_path)
