"""From a ``KVCacheConfig`` to a ``KVCache``: the policy is looked up, checked and given the pool's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trtllm_core.config import EngineConfig, KVCacheConfig
from trtllm_core.errors import ConfigError, listing
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import Executable, KVBudget, KVPolicy, Plugins


def policy_name(asked: str | None, engine: EngineConfig) -> str:
    """The policy that manages an engine's cache where ``asked`` says nothing: ``contiguous`` over linear caches."""
    return asked or ("contiguous" if engine.contract == "padded_linear" else "paged")


def make_cache(
    config: KVCacheConfig, executable: Executable, plugins: Plugins, history: np.ndarray | None = None
) -> KVCache:
    """Make the policy that the config names, let it plan, and allocate what it planned.

    ``history``: see ``KVCache``.

    Raises:
        PluginNotFoundError: no such policy.
        ConfigError: options that it refuses, or something that it needs and cannot be given here.
        CapacityError: a pool too small for anything.
    """
    build = executable.config.build
    linear = executable.capabilities.contract == "padded_linear"
    name = policy_name(config.policy, executable.config)
    policy = make_policy(name, config.options, plugins)
    if history is None and "tokens" in policy.needs:
        raise ConfigError(f"KV policy {name!r} needs the tokens of its slots, and nobody here knows them")
    size = build.max_seq_len if linear else build.tokens_per_block  # a linear cache is one block a slot
    full = build.max_branches * -(-build.max_seq_len // size) * size
    budget = KVBudget(build.max_branches, build.max_seq_len, size, config.max_tokens or full)
    return KVCache(policy, executable, budget, history)


def with_window(
    config: KVCacheConfig, window: int | None, sink: int | None, executable: Executable, plugins: Plugins
) -> KVCacheConfig:
    """The config with the window and the sinks that a request asks for; itself where it asks for none.

    Raises:
        ConfigError: the policy has no windows.
    """
    if window is None and not sink:
        return config
    name = policy_name(config.policy, executable.config)
    options = getattr(plugins.kv_policies.get(name, plugins.missing_hint("kv_policy", name)).load(), "Options", None)
    known = {} if options is None else options.model_fields
    if not {"max_attention_window", "sink_token_length"} <= known.keys():
        raise ConfigError(
            f"max_attention_window_size={window} and sink_token_length={sink}: KV policy {name!r} has no windows; "
            "choose KVCacheConfig(policy='paged')"
        )
    if window is not None and window >= executable.config.build.max_seq_len:
        window, sink = None, 0
    return config.replace(options={**config.options, "max_attention_window": window, "sink_token_length": sink or 0})


def make_policy(name: str, options: Mapping[str, Any], plugins: Plugins) -> KVPolicy:
    """The policy that is registered under a name, with its options.

    Raises:
        PluginNotFoundError: no such policy.
        ConfigError: options that it refuses, or it is no policy.
    """
    factory: Any = plugins.kv_policies.get(name, plugins.missing_hint("kv_policy", name)).load()
    model = getattr(factory, "Options", None)
    if model is None and options:
        raise ConfigError(f"KV policy {name!r} takes no options, but was given {listing(options)}")
    if model is not None and model.model_config.get("extra") != "allow":  # a plain pydantic model passes over others
        known = {alias for field, info in model.model_fields.items() for alias in (field, info.alias) if alias}
        if unknown := options.keys() - known:
            raise ConfigError(
                f"KV policy {name!r} has no option {listing(unknown)} (known: {listing(model.model_fields)})"
            )
    try:
        policy = factory(None if model is None else model(**options))
    except ValueError as error:
        raise ConfigError(f"KV policy {name!r}: {error}") from error
    if not isinstance(policy, KVPolicy):
        raise ConfigError(f"KV policy {name!r} is a {type(policy).__name__}, not a KVPolicy")
    return policy
