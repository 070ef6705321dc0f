"""The engine directory: what lies in it, and what is checked before a weight is touched."""

from __future__ import annotations

import json
from pathlib import Path

from packaging.version import Version
from pydantic import ValidationError

from trtllm_core.config import FORMAT_VERSION, EngineConfig
from trtllm_core.errors import (
    ConfigError,
    EngineCorruptError,
    EngineError,
    EngineUnsupportedError,
    EngineVersionError,
)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


def write_config(directory: Path, config: EngineConfig) -> None:
    """Write ``config.json``: the last file of a build, so that a build that was cut off leaves no engine."""
    (directory / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")


def read_config(directory: Path) -> EngineConfig:
    """Read ``config.json`` and check the versions and the rank files' sizes.

    Raises:
        EngineError: there is no engine in the directory.
        EngineVersionError: it was written in a newer format.
        EngineCorruptError: a file is missing or has another size than recorded.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise EngineError(f"{directory} holds no engine: {CONFIG} is not there; make one with trtllm-core build")
    config = parse_config(path.read_bytes(), str(path))
    for file in config.ranks:
        for each in (file, *file.companions):
            _check_file(directory / each.name, each.bytes)
    return config


def holds_engine(directory: Path) -> bool:
    """Whether an engine lies in the directory, sound or not."""
    try:
        raw = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "format_version" in raw


def parse_config(text: str | bytes, where: str) -> EngineConfig:
    """An ``EngineConfig`` from JSON, after a look at its format.

    Raises:
        EngineVersionError, EngineCorruptError: as for ``read_config``.
        EngineUnsupportedError: it is an engine of TensorRT-LLM.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise EngineCorruptError(f"{where} is not valid JSON: {error}") from error
    if isinstance(raw, dict) and raw.keys() & {"pretrained_config", "builder_config"}:
        raise EngineUnsupportedError(
            f"{where} is of an engine of TensorRT-LLM, which only the release that built it can run: build one of the "
            "same checkpoint with trtllm-core build"
        )
    if not isinstance(raw, dict) or not isinstance(raw.get("format_version"), int):
        raise EngineCorruptError(f"{where} is not the config of a trtllm-core engine: it has no format_version")
    if raw["format_version"] > FORMAT_VERSION:
        raise EngineVersionError(
            f"{where} has engine format {raw['format_version']}, written by trtllm-core {raw.get('core_version')}; "
            f"this trtllm-core reads formats up to {FORMAT_VERSION}: pip install -U trtllm-core, or build it again"
        )
    try:
        return EngineConfig(**raw)
    except (ConfigError, ValidationError) as error:
        raise EngineCorruptError(f"{where}: {error}") from error


def newer_core(config: EngineConfig, running: str) -> bool:
    """Whether the engine was built by a newer core than the one that runs."""
    return Version(config.core_version) > Version(running)


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise EngineCorruptError(f"engine file {path} is missing; build the engine again")
    found = path.stat().st_size
    if found != size:
        raise EngineCorruptError(
            f"engine file {path} has {found} bytes where config.json says {size}: it was truncated or changed; "
            "build the engine again"
        )
