"""A checkpoint's own config, field by field."""

from __future__ import annotations

from typing import Any, get_args

from trtllm_core.config import DType
from trtllm_core.errors import CheckpointError
from trtllm_core.nn.mlp import ACTIVATIONS
from trtllm_core.plugin import CheckpointView


class Fields:
    """The fields of ``config.json``, or a GGUF file's metadata under its architecture's name.

    Where several names are given, the first one that the config has counts. A field that is null counts as absent.

    Args:
        checkpoint: whose config it is.
        family: which reads it, for messages.
    """

    def __init__(self, checkpoint: CheckpointView, family: str) -> None:
        self._config, self._family = checkpoint.config, family
        self._prefix = f"{checkpoint.architecture}." if checkpoint.format == "gguf" else ""
        self._file = "the GGUF file lacks the metadata" if self._prefix else "config.json lacks"

    def get(self, *names: str, default: Any = None) -> Any:
        """A field, or ``default``."""
        for name in names:
            value = self._config.get(self._prefix + name)
            if value is not None:
                return value
        return default

    def need(self, *names: str) -> Any:
        """A field that must be there.

        Raises:
            CheckpointError: it is not.
        """
        value = self.get(*names)
        if value is None:
            raise CheckpointError(f"{self._file} {self._prefix + names[0]!r}, which family {self._family!r} needs")
        return value

    def activation(self, *names: str, default: str) -> str:
        """A field that names one of ``trtllm_core.nn.mlp.ACTIVATIONS``.

        Raises:
            CheckpointError: it names another.
        """
        value = self.get(*names, default=default)
        if value not in ACTIVATIONS:
            raise CheckpointError(f"{names[0]} {value!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
        return str(value)

    @property
    def dtype(self) -> DType:
        """The floating-point type that ``config.json`` names, or float32."""
        value: Any = self.get("torch_dtype", "dtype")
        return value if value in get_args(DType) else "float32"
