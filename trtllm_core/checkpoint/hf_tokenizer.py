"""The tokenizer of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from trtllm_core.checkpoint.jsonfile import read_exactly, read_optional
from trtllm_core.checkpoint.tokenizer import SpecialTokens, TokenizerError, TokenizerFiles, parse

_OTHER_KINDS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model")


def read_hf_tokenizer(path: Path) -> TokenizerFiles | None:
    """Read ``tokenizer.json`` and the files about it.

    Ids that end a generation come from generation_config.json, else from config.json, else from tokenizer_config.json.

    Args:
        path: the directory.

    Returns:
        The tokenizer; None if the directory has no tokenizer of any kind.

    Raises:
        TokenizerError: there is a tokenizer, but not as tokenizer.json.
        CheckpointError: a JSON file is damaged.
    """
    if not (path / "tokenizer.json").exists():
        others = [name for name in _OTHER_KINDS if (path / name).exists()]
        if not others:
            return None
        raise TokenizerError(
            f"{path} has its tokenizer in {others[0]}, not in tokenizer.json: convert it, for instance with "
            "transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
        )
    backend = parse(read_exactly(path / "tokenizer.json"))
    config = {**read_optional(path / "special_tokens_map.json"), **read_optional(path / "tokenizer_config.json")}
    special = _special_tokens(path, backend, config)
    return TokenizerFiles(backend.to_str(), _chat_template(path, config), special)


def _special_tokens(path: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> SpecialTokens:
    generation = read_optional(path / "generation_config.json")
    model = read_optional(path / "config.json")
    bos_token, eos_token, pad_token = (_text(config.get(f"{name}_token")) for name in ("bos", "eos", "pad"))

    def ids(name: str, token: str | None) -> tuple[int, ...]:
        for source in (generation, model, model.get("text_config") or {}):
            if source.get(f"{name}_token_id") is not None:
                value = source[f"{name}_token_id"]
                return tuple(value) if isinstance(value, list) else (value,)
        return _id(backend, token)

    eos_ids = ids("eos", eos_token)
    bos_id = next(iter(_id(backend, bos_token) or ids("bos", None)), None)
    pad_id = next(iter(_id(backend, pad_token) or ids("pad", None)), None)
    bos_token = bos_token or _token(backend, bos_id)
    eos_token = eos_token or _token(backend, next(iter(eos_ids), None))
    # What tokenizer.json puts around the empty text is all that it adds. An add_bos_token in the config does not count:
    # transformers ignores it too where there is a tokenizer.json.
    add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    return SpecialTokens(bos_id, eos_ids, pad_id, add_bos, bos_token, eos_token)


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return read_exactly(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, "tool_use" and the like
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id(backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    number = None if token is None else backend.token_to_id(token)
    return () if number is None else (number,)


def _token(backend: tokenizers.Tokenizer, number: int | None) -> str | None:
    return None if number is None else backend.id_to_token(number)
