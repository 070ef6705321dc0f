"""The classic, mutable ``Mapping``."""

from __future__ import annotations

from typing import Any

from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.config import Mapping as CoreMapping
from trtllm_core.config import WorldConfig

__all__ = ["Mapping", "WorldConfig"]


class Mapping:
    """A rank's place in the world, whose fields may be set afterwards. Everything derived is computed when asked for.

    Raises:
        ConfigError: (a ``ValueError``) ``tp_size * pp_size`` is not ``world_size``, or the rank is not in the world.
    """

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        tp_size: int = 1,
        pp_size: int = 1,
        *,
        cp_size: int = 1,
        moe_tp_size: int = -1,
        moe_ep_size: int = -1,
    ) -> None:
        refuse("Mapping", cp_size=cp_size - 1, moe_tp_size=moe_tp_size + 1, moe_ep_size=moe_ep_size + 1)
        self.world_size = world_size
        self.rank = rank
        self.gpus_per_node = gpus_per_node
        self.tp_size = tp_size
        self.pp_size = pp_size
        self.core  # noqa: B018  (it checks)

    @property
    def core(self) -> CoreMapping:
        """The same place as trtllm-core has it."""
        return CoreMapping(self.world_size, self.rank, self.gpus_per_node, self.tp_size, self.pp_size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.core, name)

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mapping({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


def core_mapping(mapping: Mapping | CoreMapping | None) -> CoreMapping | None:
    """What trtllm-core takes, of either kind."""
    return mapping.core if isinstance(mapping, Mapping) else mapping
