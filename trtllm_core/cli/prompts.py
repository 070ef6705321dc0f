"""Where prompts come from, and how they become tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.checkpoint import Tokenizer


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of ``file`` (``-`` is stdin); of stdin where there are neither.

    Raises:
        ConfigError: there is none, or the file is not text.
    """
    prompts = list(arguments)
    if file is not None and str(file) != "-":
        prompts += _parse(_text(file.read_bytes(), str(file)), str(file))
    elif file is not None or (not prompts and not sys.stdin.isatty()):
        prompts += _parse(_text(sys.stdin.buffer.read(), "stdin"), "stdin")
    if not prompts:
        raise ConfigError("there is no prompt: give one as an argument, with --file, or on stdin")
    return prompts


def encode(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool, system: str | None) -> list[list[int]]:
    """The tokens of each prompt; with ``chat`` as a user's message in the engine's chat template.

    Raises:
        ConfigError: ``system`` without ``chat``, or no chat template.
    """
    if not chat:
        if system is not None:
            raise ConfigError("--system is a message of a chat: it needs --chat, and an engine with a chat template")
        return [tokenizer.encode(prompt) for prompt in prompts]
    before = [] if system is None else [{"role": "system", "content": system}]
    texts = [tokenizer.apply_chat_template([*before, {"role": "user", "content": prompt}]) for prompt in prompts]
    return [tokenizer.encode(text, add_special=False) for text in texts]  # templates write special tokens themselves


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> list[str]:
    """One prompt a line; JSON lines where the first line is an object with a ``prompt``. Empty lines are left out."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines or _prompt(lines[0][1]) is None:
        return [line.rstrip("\r") for _, line in lines]
    prompts = []
    for number, line in lines:
        prompt = _prompt(line)
        if prompt is None:
            raise ConfigError(f'{where}, line {number}: not a JSON object with a text "prompt", as the first line is')
        prompts.append(prompt)
    return prompts


def _prompt(line: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    return prompt if isinstance(prompt, str) else None
