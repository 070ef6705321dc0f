"""Chat templates."""

from __future__ import annotations

import datetime

import pytest

from trtllm_core.checkpoint.chat import ChatTemplate
from trtllm_core.errors import CheckpointError, ConfigError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": None}).render(USER, **variables)


def test_special_tokens_and_prompt() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}!{% endif %}"
    assert render(source) == "<s>hi!"
    assert ChatTemplate(source, {}).render(USER, add_generation_prompt=False) == "hi"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n") == "user\n"


def test_loop_controls() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_generation_tag() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_tojson_does_not_escape_html() -> None:
    assert render("{{ tool | tojson }}", tool={"a": "<é&'>"}) == '{"a": "<é&\'>"}'
    assert render("{{ tool | tojson(indent=1) }}", tool=[1]) == "[\n 1\n]"


def test_further_variables() -> None:
    assert render("{{ tools is none }} {{ enable_thinking }}", enable_thinking=False) == "True False"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_refusal() -> None:
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="refuses these messages"):
        render("{{ messages[0].content + 1 }}")


def test_sandbox() -> None:
    with pytest.raises(ConfigError, match="refuses these messages"):
        render("{{ messages.append(1) }}")
    with pytest.raises(ConfigError, match="refuses these messages"):
        render("{{ ''.__class__.__mro__ }}")


def test_syntax_error() -> None:
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        render("{% for %}")
