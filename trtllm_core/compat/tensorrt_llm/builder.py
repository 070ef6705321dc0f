"""``Engine``: one rank of an engine directory, for ``ModelRunner.from_engine``."""

from __future__ import annotations

import os
from pathlib import Path

from trtllm_core.config import EngineConfig
from trtllm_core.engine.directory import read_config
from trtllm_core.errors import ConfigError


class Engine:
    """An engine directory that was checked, and a rank of it. Weights are read when a runner loads them."""

    def __init__(self, directory: Path, config: EngineConfig, rank: int) -> None:
        self.directory = directory
        self.config = config
        self.rank = rank

    @classmethod
    def from_dir(cls, engine_dir: str | os.PathLike[str], rank: int = 0) -> Engine:
        """Read and check ``config.json``.

        Raises:
            EngineError: there is no engine, or it is damaged.
            ConfigError: it has no such rank.
        """
        config = read_config(Path(engine_dir))
        if not 0 <= rank < len(config.ranks):
            raise ConfigError(f"{engine_dir} has ranks 0 to {len(config.ranks) - 1}; rank {rank} is not one of them")
        return cls(Path(engine_dir), config, rank)

    @property
    def engine(self) -> Path:
        """The rank's file, as ``GenerationSession`` and ``Session.from_serialized_engine`` take it."""
        return self.directory / self.config.ranks[self.rank].name


def get_engine_version(engine_dir: str | os.PathLike[str]) -> str:
    """The version of trtllm-core that built it."""
    return read_config(Path(engine_dir)).core_version
