"""JSON schemas made at random, all of whose instances are short, and an instance of each."""

from __future__ import annotations

import random
import string
from typing import Any

Schema = dict[str, Any]


def random_schema(draw: random.Random, depth: int = 3) -> Schema:
    """An object schema whose properties, items and strings are bounded."""
    return _object(draw, depth)


def _value(draw: random.Random, depth: int) -> Schema:
    kinds = [_string, _string, _integer, _enum, _constant, _boolean, _pattern]
    if depth > 0:
        kinds += [_object, _array, _array, _choice]
    return draw.choice(kinds)(draw, depth)


def _object(draw: random.Random, depth: int) -> Schema:
    names = {_word(draw) for _ in range(draw.randint(1, 4))}
    properties = {name: _value(draw, depth - 1) for name in sorted(names)}
    required = sorted(name for name in names if draw.random() < 0.7)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _value(draw, depth - 1),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _choice(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(draw, depth - 1) for _ in range(draw.randint(2, 3))]}


def _string(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 12)}


def _pattern(draw: random.Random, depth: int) -> Schema:
    patterns = ("^[a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}-[0-9]{2}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$")
    return {"type": "string", "pattern": draw.choice(patterns)}


def _integer(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 10**6)}


def _enum(draw: random.Random, depth: int) -> Schema:
    values: list[Any] = [_word(draw), draw.randint(0, 99), None, True, "ü–😀"]
    return {"enum": draw.sample(values, draw.randint(1, 4))}


def _constant(draw: random.Random, depth: int) -> Schema:
    return {"const": draw.choice([_word(draw), draw.randint(-9, 9), False])}


def _boolean(draw: random.Random, depth: int) -> Schema:
    return {"type": draw.choice(["boolean", "null"])}


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase + "_", k=draw.randint(1, 8)))


def instance(schema: Schema, draw: random.Random) -> Any:
    """A value that ``schema``, made here, accepts."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "anyOf" in schema:
        return instance(draw.choice(schema["anyOf"]), draw)
    match schema["type"]:
        case "object":
            names = (n for n in schema["properties"] if n in schema["required"] or draw.random() < 0.5)
            return {name: instance(schema["properties"][name], draw) for name in names}
        case "array":
            return [
                instance(schema["items"], draw) for _ in range(draw.randint(schema["minItems"], schema["maxItems"]))
            ]
        case "string" if "pattern" in schema:
            return {"^[a": "abc", "^[0": "2024-05-06", "^(r": "green", "^#[": "#00ff7f"}[schema["pattern"][:3]]
        case "string":
            return "".join(
                draw.choices(string.ascii_letters + " ", k=draw.randint(schema["minLength"], schema["maxLength"]))
            )
        case "integer":
            return draw.randint(schema["minimum"], schema["maximum"])
        case "boolean":
            return draw.random() < 0.5
        case _:
            return None
