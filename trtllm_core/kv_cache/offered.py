"""What a policy asks of the engine that its cache is for, and whether the engine has it."""

from __future__ import annotations

from trtllm_core.errors import ConfigError
from trtllm_core.plugin.backend import Executable
from trtllm_core.plugin.kv_policy import KVModel, KVPlan, KVPolicy

WORDS = {
    "window": "a cyclic cache (max_attention_window)",
    "positions": "positions within the cache",
    "moves": "entries that move and are dropped",
    "attention_scores": "attention scores",
    "host": "blocks in the host's memory",
}
"""What a user reads of ``Capabilities.kv``."""


def model_of(executable: Executable) -> KVModel:
    """What a policy is told of an engine's model."""
    config, offered = executable.config, executable.capabilities
    size = config.build.tp_size
    return KVModel(
        num_layers=config.model.num_layers,
        num_kv_heads=max(config.model.num_kv_heads // size, 1),
        head_size=config.model.head_size,
        dtype=config.kv_dtype,
        bytes_per_token=config.model.kv_bytes_per_token(config.kv_dtype, size),
        sliding_window=offered.attention_window if "window" in offered.kv else None,
    )


def settles(policy: KVPolicy) -> bool:
    """Whether a policy wants to hear of steps when they are over."""
    kind = type(policy)
    return kind.after_prefill is not KVPolicy.after_prefill or kind.after_step is not KVPolicy.after_step


def check_offered(policy: KVPolicy, plan: KVPlan, executable: Executable) -> None:
    """Refuse a policy that needs what the engine does not have, before anything is allocated.

    Raises:
        ConfigError: it does.
    """
    wanted = set(policy.needs - {"tokens"})
    wanted |= {"window"} if plan.window is not None else set()
    wanted |= {"positions"} if plan.positions == "cache" else set()
    wanted |= {"host"} if plan.host_blocks else set()
    wanted |= {"moves"} if plan.evicts or settles(policy) else set()
    missing = sorted(WORDS.get(name, name) for name in wanted - executable.capabilities.kv)
    if missing:
        raise ConfigError(
            f"KV policy {type(policy).__name__} needs {' and '.join(missing)}, which this engine on backend "
            f"{executable.config.backend.name!r} does not offer"
        )
