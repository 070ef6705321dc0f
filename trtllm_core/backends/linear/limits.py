"""What no engine of the padded, linear contract can be built for."""

from __future__ import annotations

from importlib.util import find_spec

from trtllm_core.config import EngineConfig
from trtllm_core.errors import ConfigError, listing


def check_limits(config: EngineConfig, needed: tuple[str, ...], install: str) -> None:
    """Refuse a build before anything is written.

    Args:
        config: of the engine.
        needed: modules that a build imports.
        install: the command that brings them.

    Raises:
        ConfigError: a module is missing, or the build asks for what these engines do not have.
    """
    name = config.backend.name
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise ConfigError(f"building needs {listing(missing)}: {install}")
    if config.build.tp_size != 1:
        raise ConfigError(f"the {name} backend runs on one rank: leave tp_size at 1")
    if config.kv_dtype != config.model.dtype:
        raise ConfigError(
            f"the {name} backend keeps keys and values in the engine's dtype, {config.model.dtype}: leave kv_dtype out"
        )
