"""What ``bench`` measures: an engine on disk, or random weights of a published shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import EngineConfig
    from trtllm_core.runner import ModelRunner


@dataclass(frozen=True)
class Subject:
    """One of both. It is plain data, so that another process can load the same."""

    engine: str = ""
    shape: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    """Of a shape: what its ``BuildConfig`` says. An engine has its own."""
    options: dict[str, Any] = field(default_factory=dict)
    """How the backend loads it, such as ``cuda_graphs``."""

    @property
    def name(self) -> str:
        """For people."""
        return self.engine or f"{self.shape} with random weights"

    def config(self) -> EngineConfig:
        """What it is and may run, without loading it."""
        if self.engine:
            from trtllm_core.engine.directory import read_config

            return read_config(Path(self.engine))
        from trtllm_core.cli.bench.shapes import find_shape
        from trtllm_core.config import BuildConfig
        from trtllm_core.engine.build import plan_engine
        from trtllm_core.plugin import Plugins

        return plan_engine(find_shape(self.shape), BuildConfig(**self.limits), Plugins.load())[0]

    def load(self, device: str) -> ModelRunner:
        """A runner over it."""
        from trtllm_core.config import BuildConfig
        from trtllm_core.runner import ModelRunner

        if self.engine:
            return ModelRunner.from_dir(self.engine, device=device, **self.options)
        from trtllm_core.cli.bench.random_engine import random_runner

        return random_runner(self.shape, BuildConfig(**self.limits), device, **self.options)

    def as_json(self) -> dict[str, Any]:
        """To make it again: ``Subject(**value)``."""
        return asdict(self)


def subject_of(
    engine: Path | None,
    shape: str | None,
    weights: dict[str, Any],
    limits: dict[str, int],
    options: dict[str, Any],
) -> Subject:
    """What the command line names.

    Args:
        weights: ``dtype``, ``quantization`` and ``kv_dtype`` of random weights, where they are not the published ones.
        limits: that a shape's engine needs: ``max_batch_size`` and its like. An engine on disk has its own.
        options: of the backend.

    Raises:
        ConfigError: both or neither are named, or something of random weights for an engine that has its own.
    """
    if (engine is None) == (shape is None):
        raise ConfigError("name an engine, or a shape with --shape NAME, and not both")
    if engine is not None:
        if weights:
            raise ConfigError("--dtype, --quant and --kv-dtype are for random weights (--shape): an engine has its own")
        return Subject(engine=str(engine), options=options)
    return Subject(shape=str(shape), limits={**limits, **weights}, options=options)
