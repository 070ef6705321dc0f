"""From an engine on disk, or in memory, to an executable."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from trtllm_core.config import EngineConfig
from trtllm_core.engine.directory import newer_core, read_config
from trtllm_core.errors import ConfigError, EngineError, EngineUnsupportedError
from trtllm_core.plugin import Backend, Executable, Plugins
from trtllm_core.version import __version__

Serialized = Path | str | bytes | bytearray | memoryview
"""An engine's rank file by path, or its bytes, best a mapping of the file."""


def load_directory(directory: Path | str, plugins: Plugins, rank: int = 0, **options: Any) -> Executable:
    """Load one rank of an engine directory, after all checks of ``read_config``.

    ``options`` are the backend's own, such as ``device`` and ``parallel``, whose rank must be ``rank``.

    Raises:
        EngineError: see ``read_config``.
        PluginNotFoundError: its family or backend is not installed; the message names the pip command.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not 0 <= rank < len(config.ranks):
        raise ConfigError(f"{directory} has ranks 0 to {len(config.ranks) - 1}; rank {rank} is not one of them")
    return load_engine(directory / config.ranks[rank].name, plugins, config, **options)


def load_engine(source: Serialized, plugins: Plugins, config: EngineConfig | None = None, **options: Any) -> Executable:
    """Load a rank's engine from its file or bytes. Without ``config``, the engine must carry its own.

    Raises:
        as ``load_directory``; EngineError where no installed backend knows what the bytes are.
    """
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, bytearray):
        source = memoryview(source)
    config = config or config_of(source, plugins)
    _check_versions(config)
    backend = _backend(config, plugins)
    family = plugins.model_families.get(
        config.family.name, plugins.missing_hint("model_family", config.family.name, config.family.distribution)
    )
    return backend.load(source, config, family.load()(), **options)


def config_of(source: Path | bytes | memoryview, plugins: Plugins) -> EngineConfig:
    """The config that a serialised engine carries in itself.

    Raises:
        EngineError: no installed backend finds one.
    """
    if isinstance(source, Path) and not source.is_file():
        raise EngineError(f"engine file {source} is not there")
    for entry in plugins.backends:
        config = entry.load()().config_of(source)
        if config is not None:
            return config
    raise EngineError("this is no engine of any installed backend: it carries no engine config")


def _backend(config: EngineConfig, plugins: Plugins) -> Backend:
    hint = plugins.missing_hint("backend", config.backend.name, config.backend.distribution)
    backend: Backend = plugins.backends.get(config.backend.name, hint).load()()
    found = backend.probe()
    if not found.available:
        raise EngineUnsupportedError(f"backend {backend.name!r} cannot work here: {found.reason}")
    return backend


def _check_versions(config: EngineConfig) -> None:
    if newer_core(config, __version__):
        warnings.warn(
            f"the engine was built by trtllm-core {config.core_version}, newer than this {__version__}; its format is "
            "one that this version reads",
            stacklevel=3,
        )
