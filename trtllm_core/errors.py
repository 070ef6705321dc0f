"""Every exception that trtllm-core raises on purpose.

A message says what went wrong, in which file, field or plugin, and what the reader can do about it. ``assert`` is kept
for mistakes of our own.
"""

from __future__ import annotations

from collections.abc import Iterable


class TrtllmCoreError(Exception):
    """Root of the tree. The command line prints it as one sentence and exits with status 2."""


class ConfigError(TrtllmCoreError, ValueError):
    """A config, an argument or a combination of settings that cannot work."""


class CheckpointError(TrtllmCoreError):
    """A checkpoint that is missing, damaged, or of a kind that nothing here can read."""


class EngineError(TrtllmCoreError, RuntimeError):
    """An engine that cannot be loaded."""


class EngineVersionError(EngineError):
    """The engine was built by, or for, something that this installation is not."""


class EngineCorruptError(EngineError):
    """A file of the engine is missing, truncated or not what ``config.json`` says."""


class EngineUnsupportedError(EngineError):
    """The engine is sound, but this machine or installation lacks what it needs."""


class PluginError(TrtllmCoreError):
    """Something a plugin did, or that concerns one."""


class PluginLoadError(PluginError):
    """A plugin that was asked for could not be loaded."""


class PluginVersionError(PluginLoadError):
    """A plugin implements another version of a hook than this core offers."""


class PluginConflictError(PluginError):
    """Two plugins registered the same name."""


class PluginNotFoundError(PluginError, LookupError):
    """Nothing is registered under a name."""


class PluginContractError(PluginError):
    """A plugin broke the contract of its hook: a wrong shape, dtype, device or return value."""


class PluginRuntimeError(PluginError, RuntimeError):
    """A plugin raised while it ran; the cause is chained."""


class BranchError(PluginRuntimeError):
    """Raised by a host plugin about the branch at hand: this one ends, and others that use the plugin go on."""


class CapacityError(TrtllmCoreError, RuntimeError):
    """More was asked for than the engine's limits or the KV pool can ever hold."""


class BackendError(TrtllmCoreError, RuntimeError):
    """A backend failed to execute an engine."""


class ExecutorError(TrtllmCoreError, RuntimeError):
    """An executor takes no requests, or had to give up those that it had; the cause is chained."""


def listing(names: Iterable[str], empty: str = "none") -> str:
    """Names for a message, sorted and quoted: ``'a', 'b'``; ``empty`` when there are none."""
    return ", ".join(repr(name) for name in sorted(names)) or empty
