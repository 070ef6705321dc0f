"""Which rank does what: ``Mapping`` is the classic Python view of a world of ranks, ``WorldConfig`` the C++ one.

Ranks are numbered with tensor parallelism innermost: the ``tp_size`` ranks of one pipeline stage are neighbours, and
the same place in the next stage is ``tp_size`` ranks further. No torch, and no MPI until :meth:`WorldConfig.mpi`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from trtllm_core.config import launch
from trtllm_core.config.base import Config
from trtllm_core.errors import ConfigError


class Mapping(Config):
    """One rank's place in a world of ``tp_size * pp_size`` ranks. Formulas are those of ``tensorrt_llm.Mapping``.

    The fields may be given by position, in the classic order.

    Raises:
        ConfigError: (a ``ValueError``) when ``tp_size * pp_size != world_size``, or the rank is not in the world.
    """

    world_size: int = Field(default=1, ge=1)
    rank: int = Field(default=0, ge=0)
    gpus_per_node: int = Field(default=8, ge=1)
    tp_size: int = Field(default=1, ge=1)
    pp_size: int = Field(default=1, ge=1)

    # Config refuses what lands in ``kw``, with a sentence that lists the known fields.
    def __init__(
        self, world_size: int = 1, rank: int = 0, gpus_per_node: int = 8, tp_size: int = 1, pp_size: int = 1, **kw: Any
    ) -> None:
        super().__init__(
            world_size=world_size, rank=rank, gpus_per_node=gpus_per_node, tp_size=tp_size, pp_size=pp_size, **kw
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tp_size * self.pp_size != self.world_size:
            raise ValueError(
                f"tp_size * pp_size must be world_size, but {self.tp_size} * {self.pp_size} is not {self.world_size}"
            )
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        return self

    @property
    def tp_rank(self) -> int:
        """Place within the tensor-parallel group: ``rank % tp_size``."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Pipeline stage: ``rank // tp_size``."""
        return self.rank // self.tp_size

    @property
    def tp_groups(self) -> list[list[int]]:
        """The ranks of every tensor-parallel group, one group a pipeline stage."""
        return [list(range(first, first + self.tp_size)) for first in range(0, self.world_size, self.tp_size)]

    @property
    def tp_group(self) -> list[int]:
        """The ranks that share this rank's layers."""
        return self.tp_groups[self.pp_rank]

    @property
    def pp_groups(self) -> list[list[int]]:
        """The ranks of every pipeline, first stage first, one pipeline a tensor-parallel rank."""
        return [list(range(first, self.world_size, self.tp_size)) for first in range(self.tp_size)]

    @property
    def pp_group(self) -> list[int]:
        """The ranks of this rank's pipeline, first stage first."""
        return self.pp_groups[self.tp_rank]

    @property
    def node_rank(self) -> int:
        """Which machine: ``rank // gpus_per_node``."""
        return self.rank // self.gpus_per_node

    @property
    def local_rank(self) -> int:
        """Which GPU of the machine: ``rank % gpus_per_node``."""
        return self.rank % self.gpus_per_node

    def prev_pp_rank(self) -> int:
        """The same place one stage earlier. Wraps: before the first stage comes the last."""
        return (self.rank - self.tp_size) % self.world_size

    def next_pp_rank(self) -> int:
        """The same place one stage later. Wraps: the last stage sends its tokens back to the first."""
        return (self.rank + self.tp_size) % self.world_size

    def has_tp(self) -> bool:
        """Whether more than one rank shares a layer."""
        return self.tp_size > 1

    def has_pp(self) -> bool:
        """Whether the layers are spread over more than one stage."""
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        """Whether this rank is in the first stage, which embeds the tokens."""
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        """Whether this rank is in the last stage, which makes the logits."""
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        """Indices of this stage's layers: one contiguous run a stage, all layers covered.

        Where ``num_layers`` does not divide evenly, the first ``num_layers % pp_size`` stages hold one layer more.
        (The classic runtime dropped those layers silently.) A negative number raises ConfigError.
        """
        if num_layers < 0:
            raise ConfigError(f"num_layers must not be negative, got {num_layers}")
        share, rest = divmod(num_layers, self.pp_size)
        first = self.pp_rank * share + min(self.pp_rank, rest)
        return list(range(first, first + share + (self.pp_rank < rest)))

    def ep_experts(self, num_experts: int) -> list[int]:
        """Indices of this rank's experts, a ``tp_size``-th of them; ConfigError where that is no whole number."""
        share, rest = divmod(num_experts, self.tp_size)
        if rest or num_experts < 0:
            raise ConfigError(f"{num_experts} experts cannot be shared out evenly over tp_size {self.tp_size}")
        return list(range(self.tp_rank * share, (self.tp_rank + 1) * share))

    def world(self, device_ids: Sequence[int] | None = None) -> WorldConfig:
        """The same place as a ``WorldConfig``, which can also name the devices."""
        return WorldConfig(self.tp_size, self.pp_size, self.rank, self.gpus_per_node, device_ids)


class WorldConfig(Config):
    """One rank's place in the world, and its device. Semantics are those of the C++ runtime's ``WorldConfig``.

    The fields may be given by position, in the classic order. Device ids that are not contiguous draw a warning.

    Raises:
        ConfigError: (a ``ValueError``) for a parallelism below one, a rank outside the world, or device ids that are
            none, repeated, more than ``gpus_per_node``, or outside ``[0, gpus_per_node)``.
    """

    tensor_parallelism: int = Field(default=1, ge=1)
    pipeline_parallelism: int = Field(default=1, ge=1)
    rank: int = Field(default=0, ge=0)
    gpus_per_node: int = Field(default=8, ge=1)
    device_ids: tuple[int, ...] | None = Field(default=None, description="None is 0 .. gpus_per_node - 1")

    def __init__(
        self,
        tensor_parallelism: int = 1,
        pipeline_parallelism: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        device_ids: Sequence[int] | None = None,
        **kw: Any,
    ) -> None:
        super().__init__(
            tensor_parallelism=tensor_parallelism,
            pipeline_parallelism=pipeline_parallelism,
            rank=rank,
            gpus_per_node=gpus_per_node,
            device_ids=device_ids,
            **kw,
        )
        ids = self.device_ids
        if ids and max(ids) - min(ids) != len(ids) - 1:
            warnings.warn(f"WorldConfig: device_ids {list(ids)} are not contiguous", stacklevel=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank >= self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")
        ids = self.device_ids
        if ids is None:
            return self
        if not 0 < len(ids) <= self.gpus_per_node:
            raise ValueError(f"device_ids: give 1 to {self.gpus_per_node} (gpus_per_node) of them, got {len(ids)}")
        if min(ids) < 0 or max(ids) >= self.gpus_per_node:
            raise ValueError(f"device_ids {list(ids)} must be in [0, {self.gpus_per_node}), below gpus_per_node")
        if len(set(ids)) < len(ids):
            raise ValueError(f"device_ids {list(ids)} must be unique")
        return self

    @classmethod
    def mpi(
        cls,
        gpus_per_node: int = 8,
        tensor_parallelism: int | None = None,
        pipeline_parallelism: int | None = None,
        device_ids: Sequence[int] | None = None,
    ) -> Self:
        """This process's place among the ranks of ``MPI.COMM_WORLD``.

        Pipeline parallelism defaults to 1, tensor parallelism to all ranks that are left.

        Raises:
            ConfigError: without mpi4py or an MPI library, or when the numbers do not multiply to the world's size.
        """
        size, rank = launch.mpi_world()
        tp, pp = launch.shares("MPI", size, tensor_parallelism, pipeline_parallelism)
        return cls(tp, pp, rank, gpus_per_node, device_ids)

    @classmethod
    def from_env(cls, tensor_parallelism: int | None = None, pipeline_parallelism: int | None = None) -> Self:
        """This process's place as torchrun tells it in ``RANK`` and ``WORLD_SIZE``; defaults as in :meth:`mpi`.

        ``gpus_per_node`` is torchrun's ``LOCAL_WORLD_SIZE``, or 8 where that is not set.

        Raises:
            ConfigError: when a variable is missing or no number, or the numbers do not multiply to the world's size.
        """
        size, rank, gpus_per_node = launch.env_world()
        tp, pp = launch.shares("torchrun", size, tensor_parallelism, pipeline_parallelism)
        return cls(tp, pp, rank, gpus_per_node)

    @property
    def size(self) -> int:
        """Number of ranks in the world."""
        return self.tensor_parallelism * self.pipeline_parallelism

    @property
    def last_rank(self) -> int:
        """The world's highest rank."""
        return self.size - 1

    @property
    def gpus_per_group(self) -> int:
        """Number of devices used on one machine."""
        return self.gpus_per_node if self.device_ids is None else len(self.device_ids)

    @property
    def device(self) -> int:
        """Id of this rank's device."""
        return self.device_of(self.rank)

    def device_of(self, rank: int) -> int:
        """Id of a rank's device on its machine: ``device_ids[rank % gpus_per_group]``."""
        place = rank % self.gpus_per_group
        return place if self.device_ids is None else self.device_ids[place]

    @property
    def tensor_parallel_rank(self) -> int:
        """Place within the tensor-parallel group."""
        return self.mapping().tp_rank

    @property
    def pipeline_parallel_rank(self) -> int:
        """Pipeline stage."""
        return self.mapping().pp_rank

    @property
    def tensor_parallel_group(self) -> list[int]:
        """The ranks that share this rank's layers."""
        return self.mapping().tp_group

    @property
    def pipeline_parallel_group(self) -> list[int]:
        """The ranks of this rank's pipeline, first stage first."""
        return self.mapping().pp_group

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether more than one rank shares a layer."""
        return self.mapping().has_tp()

    @property
    def is_pipeline_parallel(self) -> bool:
        """Whether the layers are spread over more than one stage."""
        return self.mapping().has_pp()

    @property
    def is_first_pipeline_parallel_rank(self) -> bool:
        """Whether this rank is in the first stage."""
        return self.mapping().is_first_pp_rank()

    @property
    def is_last_pipeline_parallel_rank(self) -> bool:
        """Whether this rank is in the last stage."""
        return self.mapping().is_last_pp_rank()

    def valid_mpi_config(self) -> bool:
        """Whether MPI runs exactly ``size`` ranks. Raises ConfigError where :meth:`mpi` would for want of MPI."""
        return launch.mpi_world()[0] == self.size

    def mapping(self) -> Mapping:
        """The same place as a ``Mapping``, which does not name devices."""
        return Mapping(self.size, self.rank, self.gpus_per_node, self.tensor_parallelism, self.pipeline_parallelism)
