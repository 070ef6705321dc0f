"""What a request may ask for, as a grammar of llguidance."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Self

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark
from pydantic import BaseModel, ConfigDict, model_validator

KINDS = ("json_schema", "json_object", "regex", "grammar")
_ONE_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GuidedParams(BaseModel):
    """Exactly one of the first four says what the whole text must be.

    Attributes:
        json_schema: a JSON schema: an object, its JSON text, or True for any value.
        json_object: any JSON object.
        regex: in the syntax of Rust's ``regex``: no look-around, no backreferences.
        grammar: EBNF as Lark writes it (``start: …``) or as llama.cpp does (``root ::= …``).
        whitespace: JSON may have any whitespace between its tokens. Without it there is one way to write a value, that
            of Python's ``json.dumps``, which a model cannot fill with blanks for ever.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_schema: dict[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    whitespace: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if self.json_schema is False:
            raise ValueError("json_schema: the schema False accepts nothing")
        if len(asked) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {' and '.join(asked) or 'none'}")
        if self.whitespace and asked[0] not in ("json_schema", "json_object"):
            raise ValueError(f"whitespace is for JSON, not for a {asked[0]}")
        if reason := _refused(self.for_matcher()):
            raise ValueError(f"{asked[0]}: {reason}")
        return self

    def for_matcher(self) -> str:
        """The grammar, as ``LLMatcher`` takes it.

        Raises:
            ValueError: what was asked for cannot be read.
        """
        grammar: str
        if self.regex is not None:
            grammar = LLMatcher.grammar_from_regex(self.regex)
        elif self.grammar is not None:
            grammar = LLMatcher.grammar_from_lark(_lark(self.grammar))
        else:
            schema = {"type": "object"} if self.json_object else _schema(self.json_schema)
            layout: Any = {} if self.whitespace else _ONE_LAYOUT
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=layout)
        return grammar


def _schema(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
    except ValueError as error:
        raise ValueError(f"json_schema: it is no JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"json_schema: a schema is an object, not {given[:40]}")
    return schema


def _lark(text: str) -> str:
    try:
        lark: str = any_to_lark(text)
        return lark
    except Exception as error:
        raise ValueError(f"grammar: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=64)
def _refused(grammar: str) -> str:
    """Why llguidance refuses a grammar, in one line; empty where it does not."""
    text = LLMatcher.validate_grammar(grammar)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Of a regular expression the parser draws a picture, and says in a line of its own what is wrong.
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return found[0] if found else lines[0] if lines else ""
