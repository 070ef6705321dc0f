"""Tokenizers: what a checkpoint brings, how an engine directory keeps it, and what encodes and decodes at run time."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from trtllm_core.checkpoint.chat import ChatTemplate
from trtllm_core.checkpoint.jsonfile import read_exactly, read_object
from trtllm_core.errors import CheckpointError, ConfigError

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be read. The model beside it can still be built and run on ids."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens with a meaning of their own.

    Attributes:
        bos_id: begins a text; None if the model has no such token.
        eos_ids: each of them ends a generation; the first is the main one.
        pad_id: fills rows; None if the model has no such token.
        add_bos: whether ``encode`` puts ``bos_id`` in front.
        bos_token: its text, which chat templates use.
        eos_token: likewise, of the main one.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    add_bos: bool = False
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as text, to be kept beside an engine.

    Attributes:
        tokenizer_json: in the format of the ``tokenizers`` library. It adds BOS by itself where ``special.add_bos``.
        chat_template: Jinja source; None if the model has none.
        special: the special tokens.
    """

    tokenizer_json: str
    chat_template: str | None
    special: SpecialTokens

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if there is one, ``chat_template.jinja``.

        Args:
            directory: an existing directory; files of an earlier tokenizer in it are replaced.
        """
        directory = Path(directory)
        (directory / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8", newline="")
        # The class is for transformers' AutoTokenizer, which can read the directory too.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **dataclasses.asdict(self.special)}
        text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        template = directory / TEMPLATE_FILE
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            template.write_text(self.chat_template, encoding="utf-8", newline="")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> TokenizerFiles:
        """Read what ``write`` wrote.

        Raises:
            TokenizerError: the directory holds no tokenizer, or not one that ``write`` wrote.
        """
        directory = Path(directory)
        if not (directory / TOKENIZER_FILE).exists():
            raise TokenizerError(f"{directory} holds no {TOKENIZER_FILE}: its model takes and gives ids only.")
        config = read_object(directory / CONFIG_FILE)
        fields = {field.name for field in dataclasses.fields(SpecialTokens)}
        if not {"eos_ids", "add_bos"} <= config.keys():
            raise TokenizerError(f"{directory / CONFIG_FILE} was not written by trtllm-core: build the engine again.")
        special = {key: value for key, value in config.items() if key in fields}
        template = directory / TEMPLATE_FILE
        return cls(
            tokenizer_json=read_exactly(directory / TOKENIZER_FILE),
            chat_template=read_exactly(template) if template.exists() else None,
            special=SpecialTokens(**{**special, "eos_ids": tuple(special["eos_ids"])}),
        )


class Tokenizer:
    """Text to ids and back.

    Args:
        files: the tokenizer as text.

    Raises:
        TokenizerError: the text is no tokenizer.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self._backend = parse(files.tokenizer_json)

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of an engine directory.

        Raises:
            TokenizerError: the directory holds none.
        """
        return cls(TokenizerFiles.read(directory))

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if there is one."""
        return self.files.special.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a generation, the main one first."""
        return self.files.special.eos_ids

    @property
    def pad_id(self) -> int | None:
        """The id that fills rows, if there is one."""
        return self.files.special.pad_id

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's logits may be wider."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self.files.chat_template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of a text. Special tokens written out in it become their ids.

        Args:
            text: any text.
            add_special: add what the model expects around a text, which is BOS or nothing for most. A prompt made by
                ``apply_chat_template`` has that already: encode it with False.
        """
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 (a character cut in two) become U+FFFD; spaces stay as they are.

        Args:
            ids: ids from 0; those outside the vocabulary decode to nothing.
            skip_special: leave special tokens out.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation, special tokens written out.

        Args:
            messages: each with "role" and "content", and whatever else the template knows.
            add_generation_prompt: end with the head of the assistant's next message.
            variables: further variables of the template ("tools", "enable_thinking").

        Raises:
            ConfigError: the model has no chat template, or the template refuses the messages.
            CheckpointError: the template is not valid.
        """
        return self._template.render(messages, add_generation_prompt, **variables)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.files.chat_template is None:
            raise ConfigError("This model has no chat template: give it a plain text instead of messages.")
        special = self.files.special
        pad_token = None if special.pad_id is None else self._backend.id_to_token(special.pad_id)
        variables = {"bos_token": special.bos_token, "eos_token": special.eos_token, "pad_token": pad_token}
        return ChatTemplate(self.files.chat_template, variables)


def parse(tokenizer_json: str) -> tokenizers.Tokenizer:
    """A ``tokenizers`` tokenizer from its JSON, that neither truncates nor pads.

    Raises:
        TokenizerError: the text is no tokenizer.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:
        raise TokenizerError(f"{TOKENIZER_FILE} is damaged, or needs a newer tokenizers package ({error}).") from None
    backend.no_truncation()  # files saved after training often carry the training's length limit
    backend.no_padding()
    return backend


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make a tokenizer add these tokens, and nothing else, around a text.

    Args:
        backend: is changed; the tokens must be in its vocabulary.
        bos: in front, or None.
        eos: at the end, or None.
    """
    added = [token for token in (bos, eos) if token is not None]
    template = [*([f"{bos}:0"] if bos is not None else []), "$A:0", *([f"{eos}:0"] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, "$B:1"],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(added)],
    )
