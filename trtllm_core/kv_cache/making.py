"""From a ``KVCacheConfig`` to a ``KVCache``: the policy is looked up, checked and given the pool's size."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtllm_core.config import KVCacheConfig
from trtllm_core.errors import ConfigError, listing
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import Executable, KVBudget, KVPolicy, Plugins

UNUSED = ("after_prefill", "after_step")
"""Verbs that the loop does not call: a policy that relies on one is refused rather than half used."""


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
    policy = make_policy(config, plugins)
    needs = set(policy.needs - ({"tokens"} if history is not None else set()))
    needs |= {name for name in UNUSED if getattr(type(policy), name) is not getattr(KVPolicy, name)}
    if needs:
        raise ConfigError(f"KV policy {config.policy!r} needs {listing(needs)}, which this session cannot give it")
    build = executable.config.build
    size = build.tokens_per_block
    full = build.max_branches * -(-build.max_seq_len // size) * size
    budget = KVBudget(build.max_branches, build.max_seq_len, size, config.max_tokens or full)
    return KVCache(policy, executable, budget, history)


def make_policy(config: KVCacheConfig, plugins: Plugins) -> KVPolicy:
    """The policy that the config names, with its options.

    Raises:
        PluginNotFoundError: no such policy.
        ConfigError: options that it refuses, or it is no policy.
    """
    entry = plugins.kv_policies.get(config.policy, plugins.missing_hint("kv_policy", config.policy))
    factory: Any = entry.load()
    model = getattr(factory, "Options", None)
    if model is None and config.options:
        raise ConfigError(f"KV policy {config.policy!r} takes no options, but was given {listing(config.options)}")
    if model is not None and model.model_config.get("extra") != "allow":  # a plain pydantic model passes over others
        known = {name for n, f in model.model_fields.items() for name in (n, f.alias) if name}
        if unknown := config.options.keys() - known:
            raise ConfigError(
                f"KV policy {config.policy!r} has no option {listing(unknown)} (known: {listing(model.model_fields)})"
            )
    try:
        policy = factory(None if model is None else model(**config.options))
    except ValueError as error:
        raise ConfigError(f"KV policy {config.policy!r}: {error}") from error
    if not isinstance(policy, KVPolicy):
        raise ConfigError(f"KV policy {config.policy!r} is a {type(policy).__name__}, not a KVPolicy")
    return policy
