"""Reading text and JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtllm_core.errors import CheckpointError


def read_exactly(path: Path) -> str:
    """The UTF-8 text in a file, line ends as they are.

    Raises:
        CheckpointError: the file is missing, or holds no UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}).") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, or holds no JSON object.
    """
    try:
        value = json.loads(read_exactly(path))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    Raises:
        CheckpointError: the file is there but holds no JSON object.
    """
    return read_object(path) if path.exists() else {}
