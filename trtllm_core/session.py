"""``Session``: one loaded engine on one rank. Named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_core.config import EngineConfig
from trtllm_core.debugging import DebugBuffers
from trtllm_core.engine.load import Serialized, load_directory, load_engine
from trtllm_core.errors import BackendError, ConfigError, listing
from trtllm_core.plugin import Executable, Plugins, TensorSpec
from trtllm_core.pointers import Pointer

Given = torch.Tensor | Pointer


@dataclass(frozen=True)
class TensorInfo:
    """Describes an input or output; holds no data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Session:
    """Runs an engine, as the classic ``Session`` did.

    ``run`` does what the engine does and nothing else: who keeps track of sequences and caches is the caller.
    """

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._specs = {spec.name: spec for spec in executable.tensors}
        self._inputs = frozenset(name for name, spec in self._specs.items() if spec.is_input)
        needed = {name for name, spec in self._specs.items() if not spec.optional}
        self._needed, self._outputs = self._inputs & needed, needed - self._inputs
        self.debug: DebugBuffers | None = None
        """In debug mode, the tensors of the last run; see ``start_debug``."""

    @classmethod
    def from_serialized_engine(cls, engine: Serialized, *, plugins: Plugins | None = None, **options: Any) -> Session:
        """Load an engine from a rank file's path, a mapping of it, or bytes.

        Args:
            engine: path, ``memoryview`` (such as of an ``mmap``) or bytes. Only a path or mapping avoids a copy.
            plugins: where backend and family are looked up; None loads what is installed.
            options: the backend's own, such as ``device="cuda"``.

        Raises:
            EngineError, PluginNotFoundError: it cannot be loaded here; the message says why.
        """
        return cls(load_engine(engine, plugins or Plugins.load(), **options))

    @classmethod
    def from_directory(
        cls, directory: Path | str, rank: int = 0, *, plugins: Plugins | None = None, **options: Any
    ) -> Session:
        """Load one rank of an engine directory, after its config was checked."""
        return cls(load_directory(directory, plugins or Plugins.load(), rank, **options))

    @classmethod
    def from_engine(cls, engine: Executable) -> Session:
        """Wrap an engine that a backend has loaded already."""
        return cls(engine)

    @property
    def engine(self) -> Executable:
        """The loaded engine."""
        return self._executable

    @property
    def config(self) -> EngineConfig:
        """What the engine was built from and for."""
        return self._executable.config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._executable.device

    @property
    def context_mem_size(self) -> int:
        """Bytes of weights on this rank."""
        return self._executable.weight_bytes()

    def set_shapes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Check the inputs of a call against the engine's limits.

        Raises:
            ValueError: a name is no input, or a shape lies outside ``[min, max]``, which the message names.
        """
        self._bind({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def infer_shapes(self, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
        """The outputs that a call with these inputs has.

        Raises:
            ValueError: a name is no input, a dtype is wrong, or a shape lies outside the engine's limits.
            RuntimeError: the shapes disagree with each other, or an input that an output depends on is missing.
        """
        for info in inputs:
            spec = self._input(info.name)
            if spec.dtype != str(info.dtype).removeprefix("torch."):
                raise ConfigError(f"input {info.name!r} must be {spec.dtype}, not {info.dtype}")
        symbols = self._bind({info.name: tuple(info.shape) for info in inputs})
        out = []
        for spec in self._specs.values():
            if spec.is_input:
                continue
            missing = [part for part in spec.shape if isinstance(part, str) and part not in symbols]
            if missing and spec.optional:
                continue
            if missing:
                raise BackendError(f"the shape of output {spec.name!r} needs the inputs that have {listing(missing)}")
            shape = tuple(symbols[part] if isinstance(part, str) else part for part in spec.shape)
            out.append(TensorInfo(spec.name, getattr(torch, spec.dtype), shape))
        return out

    @property
    def debug_mode(self) -> bool:
        """Whether the tensors of each run are kept."""
        return self.debug is not None

    def start_debug(self, debug: DebugBuffers | None = None) -> None:
        """Keep the tensors of each run from now on: inputs, outputs, and what the backend has between them.

        Each run then waits for the device, and none is replayed from a CUDA graph.
        """
        self.debug = debug or DebugBuffers()
        self._executable.debugging = True

    def dump_debug_buffers(self, step: int, folder: Path | str | None = None) -> list[Path]:
        """Write the last run's tensors as ``FOLDER/rank{r}/{name}-step{step}.npy``, and say where.

        Raises:
            ConfigError: the session is not in debug mode.
        """
        if self.debug is None:
            raise ConfigError("the session keeps no tensors: it is not in debug_mode")
        return self.debug.dump(step, folder)

    def run(self, inputs: Mapping[str, Given], outputs: Mapping[str, Given], stream: int = 0) -> bool:
        """Run once into ``outputs``. Asynchronous where the device is: the caller synchronises ``stream``.

        Args:
            inputs: tensors, or pointers to memory that others own.
            outputs: alike; they are written.
            stream: a raw CUDA stream; 0 is the one that PyTorch works on.

        Returns True; a run that could not be enqueued raises instead of returning False.

        Raises:
            ConfigError: (a ``ValueError``) an input or output is missing.
            BackendError: the backend could not run it.
        """
        if not (self._needed <= inputs.keys() and self._outputs <= outputs.keys()):
            missing = (self._needed - inputs.keys()) | (self._outputs - outputs.keys())
            raise ConfigError(f"run() lacks {listing(missing)}: it takes every input and output of the engine")
        given, results = self._tensors(inputs), self._tensors(outputs)
        self._executable.execute(given, results, stream)
        if self.debug is not None:
            if stream and self.device.type == "cuda":
                torch.cuda.ExternalStream(stream, device=self.device).synchronize()  # type: ignore[no-untyped-call]
            self.debug.take({**given, **self._executable.debug_tensors(), **results})
        return True

    def _tensors(self, given: Mapping[str, Given]) -> Mapping[str, torch.Tensor]:
        if not any(isinstance(one, Pointer) for one in given.values()):
            return given  # type: ignore[return-value]
        return {name: one.tensor(self.device) if isinstance(one, Pointer) else one for name, one in given.items()}

    def _input(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None or not spec.is_input:
            known = listing(n for n, s in self._specs.items() if s.is_input)
            raise ConfigError(f"{name!r} is not an input of the engine (inputs: {known})")
        return spec

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        symbols: dict[str, int] = {}
        for name, shape in shapes.items():
            spec = self._input(name)
            fits = len(shape) == len(spec.shape) and all(
                low <= size <= high for low, size, high in zip(spec.minimum, shape, spec.maximum, strict=True)
            )
            if not fits:
                raise ConfigError(
                    f"input {name!r} has shape {list(shape)}, outside the engine's "
                    f"[min {list(spec.minimum)}, max {list(spec.maximum)}]"
                )
            for part, size in zip(spec.shape, shape, strict=True):
                if isinstance(part, str) and symbols.setdefault(part, size) != size:
                    raise BackendError(f"input {name!r} has {size} {part} where another input has {symbols[part]}")
        return symbols
