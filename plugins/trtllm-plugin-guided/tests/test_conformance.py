"""The core's kit for logits processors, on grammars of each kind."""

from __future__ import annotations

from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.vocabulary import byte_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


class TestGuided(LogitsProcessorConformance):
    plugin = "guided"
    params = (
        {"regex": "[\\x00-\\x7f]*"},
        {"json_schema": SCHEMA},
        {"json_schema": SCHEMA, "whitespace": True},
        {"grammar": 'start: ("a" | "bc")+ /[0-9]*/'},
    )
    tokenizer = byte_tokenizer(['{"', '": ', "name", "ab", "bca", '"}'])
    vocab_size = 264
