"""Chat templates: the Jinja programs that turn messages into a prompt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtllm_core.errors import CheckpointError, ConfigError


class ChatTemplate:
    """A compiled chat template. It runs in a sandbox: a template comes with a checkpoint, and is not trusted.

    Args:
        source: the Jinja source.
        variables: what every rendering sees, such as ``bos_token``; those that are None are left undefined.

    Raises:
        CheckpointError: the source is no valid template.
    """

    def __init__(self, source: str, variables: Mapping[str, str | None]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._variables = {name: value for name, value in variables.items() if value is not None}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"The chat template is not valid Jinja: {error} (line {error.lineno}).") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: each with "role" and "content", and whatever else the template knows.
            add_generation_prompt: end with the head of the assistant's next message.
            variables: further variables of the template ("tools", "enable_thinking").

        Raises:
            ConfigError: the template refuses the messages.
        """
        known = {"tools": None, "documents": None, **self._variables, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"The chat template refuses these messages: {error}") from error


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which models have never seen.
    dumps: Callable[..., str] = json.dumps
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
