"""Making plugins and their parameters, each from what was registered and asked for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from trtllm_core.config import PluginUse
from trtllm_core.config.base import problems
from trtllm_core.decoding.branching import overrides
from trtllm_core.errors import ConfigError, PluginContractError, PluginError, PluginRuntimeError, listing
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.plugin.registrar import Entry

HOST_ONLY = {"begin": "start", "commit": "accept", "fork": "copy", "rewind": "take_back"}
"""What the adapters of host plugins do with a slot, and the method of the plugin that they call for it."""


def made(entry: Entry[Any], bases: tuple[type, ...], kind: str) -> SlotPlugin:
    """The plugin that was registered.

    Raises:
        PluginError: it cannot be imported or made, or is not of its kind.
    """
    factory = entry.load()
    try:
        thing = factory()
    except PluginError:
        raise
    except Exception as error:
        raise PluginRuntimeError(
            f"{entry.name!r} of {entry.source} could not be made: {type(error).__name__}: {error}"
        ) from error
    check_kind(entry.name, thing, bases, kind)
    return thing  # type: ignore[no-any-return]


def check_kind(name: str, thing: object, bases: tuple[type, ...], kind: str) -> None:
    """Hold an object against its kind.

    Raises:
        PluginContractError: it is of another one, or has methods that are never called.
    """
    if not isinstance(thing, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise PluginContractError(f"{kind.replace('_', ' ')} {name!r} is a {type(thing).__name__}, not a {wanted}")
    for host in (HostLogitsProcessor, HostStoppingCriterion):
        for method, instead in HOST_ONLY.items():
            if overrides(thing, host, method):
                raise PluginContractError(
                    f"plugin {name!r} is a {host.__name__} and has {method}, which is never called: write {instead}"
                )


def parameters(plugin: SlotPlugin, use: PluginUse) -> Any:
    """The parameters of one use, as the plugin's own class has them; None where it takes none.

    Raises:
        ConfigError: a name or a value that the plugin does not take.
    """
    if plugin.Params is None:
        if use.params:
            raise ConfigError(f"plugin {use.name!r} takes no parameters, but was given {listing(use.params)}")
        return None
    _check_names(plugin.Params, use)
    try:
        return plugin.Params(**use.params)
    except ValidationError as error:
        raise ConfigError(f"plugin {use.name!r}: {problems(plugin.Params, error)}") from error
    except ValueError as error:
        raise ConfigError(f"plugin {use.name!r}: {error}") from error


def _check_names(model: type[BaseModel], use: PluginUse) -> None:
    """A plain pydantic model passes over names that it does not know."""
    if model.model_config.get("extra") == "allow":
        return
    fields = model.model_fields.items()
    known = {n for name, f in fields for n in (name, f.alias, f.validation_alias) if isinstance(n, str)}
    if all(f.validation_alias is None or isinstance(f.validation_alias, str) for _, f in fields):
        unknown = use.params.keys() - known
        if unknown:
            raise ConfigError(f"plugin {use.name!r} has no parameter {listing(unknown)}; it has {listing(known)}")
