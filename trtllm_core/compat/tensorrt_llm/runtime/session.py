"""The classic ``Session`` and ``TensorInfo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.logger import logger
from trtllm_core.errors import ConfigError
from trtllm_core.session import Session as CoreSession
from trtllm_core.session import TensorInfo

__all__ = ["Session", "TensorInfo"]


class Session(CoreSession):
    """One loaded engine: ours, with the arguments that the classic methods had. There is one execution context."""

    @property
    def runtime(self) -> Any:
        """What runs the engine: the backend's executable."""
        return self.engine

    @property
    def context(self) -> Any:
        """The one execution context."""
        return self.engine

    def set_shapes(self, tensors: Mapping[str, torch.Tensor], context: Any = None) -> None:
        """See trtllm-core's ``Session.set_shapes``; ``context`` is the one there is."""
        self._check(context)
        super().set_shapes(tensors)

    def infer_shapes(self, inputs: Sequence[TensorInfo], context: Any = None) -> list[TensorInfo]:
        """See trtllm-core's ``Session.infer_shapes``."""
        self._check(context)
        return super().infer_shapes(inputs)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: int = 0, context: Any = None) -> bool:
        """See trtllm-core's ``Session.run``. Addresses instead of tensors are refused: they have no length."""
        self._check(context)
        for name, tensor in {**inputs, **outputs}.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"Session.run: {name!r} is a {type(tensor).__name__}; give a tensor")
        return super().run(inputs, outputs, stream)

    def _check(self, context: Any) -> None:
        refuse("Session", context=None if context is self.engine else context)

    def _print_engine_info(self) -> None:
        config = self.config
        logger.info(f"{config.family.name} on {config.backend.name}, {self.context_mem_size} bytes of weights")
        self._print_io_info()

    def _print_io_info(self) -> None:
        for spec in self.engine.tensors:
            kind = "input" if spec.is_input else "output"
            logger.info(f"{kind} {spec.name}: {spec.dtype} {list(spec.minimum)} to {list(spec.maximum)}")
