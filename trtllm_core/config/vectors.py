"""Fields with one value for each sequence of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_core.config.words import words_of
from trtllm_core.errors import ConfigError

_DEPTH = {
    "end_id": 1,
    "stop_words_list": 2,
    "bad_words_list": 2,
    "stop_strings": 1,
    "stop_regexes": 1,
    "beam_width_array": 1,
    "embedding_bias": 1,
}
"""How deeply the value of one sequence is nested, at most; of all other fields it is a number or a word."""

_WORDS = ("stop_words_list", "bad_words_list")
"""Fields whose arrays, ``[batch, 2, L]``, are of the form that ``to_word_list_format`` makes."""

_WHOLE = ("decoder", "logits_processors", "stopping_criteria")
"""Fields that are one value for all."""


def rows_of(batch_size: int, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each sequence. A vector's None leaves the field out.

    Args:
        batch_size: how many there are.
        fields: names of SamplingConfig to one value, or to a vector (list, tuple, array, tensor) of them.

    Raises:
        ConfigError: a vector of another length.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(batch_size)]
    for name, value in fields.items():
        if name in _WORDS and getattr(value, "ndim", 0) == 3:
            value = words_of(value.tolist())
        value = value.tolist() if hasattr(value, "tolist") else value
        if not _is_vector(name, value):
            for row in rows:
                row[name] = value
            continue
        if len(value) not in (1, batch_size):
            raise ConfigError(
                f"{name} has {len(value)} values for a batch of {batch_size}: give one value, or one for each sequence"
            )
        for row, item in zip(rows, value * batch_size if len(value) == 1 else value, strict=True):
            if item is not None:
                row[name] = item
    return rows


def _is_vector(name: str, value: Any) -> bool:
    if name in _WHOLE or not isinstance(value, (list, tuple)):
        return False
    of_mappings = any(isinstance(item, Mapping) for item in value)  # biases, each for some tokens
    return of_mappings or _depth(value) > _DEPTH.get(name, 0)


def _depth(value: Any) -> int:
    if hasattr(value, "ndim"):
        return int(value.ndim)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return 0
    return 1 + max(map(_depth, value), default=0)
