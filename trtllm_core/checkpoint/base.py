"""What every checkpoint offers, whatever the format of its files."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trtllm_core.checkpoint.fingerprint import fingerprint
from trtllm_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from trtllm_core.checkpoint.tokenizer import TokenizerFiles
    from trtllm_core.quantize import QuantizedWeight


class Checkpoint(ABC):
    """Weights and config as others publish them, opened for reading.

    Opening maps the files into memory and reads their headers; a weight's bytes are read when its tensor is used. Names
    are the file's own ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"): a model family maps them.

    Attributes:
        path: what was opened: the directory (HF) or the file (GGUF).
        format: "hf" or "gguf".
    """

    format: ClassVar[Literal["hf", "gguf"]]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The file's name for its architecture: "LlamaForCausalLM" (HF), "llama" (GGUF)."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's own config: ``config.json`` (HF), or the metadata as key to Python value (GGUF).

        GGUF arrays are decoded when they are looked up, so iterating over keys is cheap and over values is not.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that all tensors take as stored."""

    def digest(self) -> str:
        """What tells this checkpoint from another: see ``fingerprint``."""
        return fingerprint(self.path)

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in torch's order (a linear layer's weight is ``[out, in]`` in both formats).

        Raises:
            CheckpointError: there is no such tensor.
        """

    @abstractmethod
    def stored(self, name: str) -> str:
        """The type in which a tensor is stored: "BF16", "F32", "Q4_1".

        Raises:
            CheckpointError: there is no such tensor.
        """

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Unquantised tensors are views of the memory-mapped file in the stored dtype: treat them as read-only (a write
        never reaches the file, but other views of the tensor see it). GGUF-quantised ones are dequantised to a new
        float32 tensor.

        Raises:
            CheckpointError: there is no such tensor, or nothing here can dequantise its type.
        """

    def quantized(self, name: str) -> QuantizedWeight:
        """A weight's own codes and scales, on the CPU: see ``trtllm_core.quantize``.

        Raises:
            CheckpointError: it is not stored as codes that can be taken over.
        """
        raise CheckpointError(f"{self.path}: tensor {name!r} is stored as {self.stored(name)}, which has no codes")

    @abstractmethod
    def tokenizer(self) -> TokenizerFiles | None:
        """The checkpoint's tokenizer; None if it brings none (such a model takes and gives ids only).

        Raises:
            TokenizerError: it brings one of a kind that cannot be read.
        """

    def _unknown(self, name: str) -> CheckpointError:
        near = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"; near names: {', '.join(map(repr, near))}" if near else ""
        return CheckpointError(f"{self.path} has no tensor {name!r} (it has {len(self.names())}){hint}.")
