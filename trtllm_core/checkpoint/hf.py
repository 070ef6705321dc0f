"""Hugging Face checkpoints: a directory with ``config.json`` and safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safetensors import SafetensorError, safe_open

from trtllm_core.checkpoint.base import Checkpoint
from trtllm_core.checkpoint.jsonfile import read_object
from trtllm_core.errors import CheckpointError, listing

if TYPE_CHECKING:
    import torch

    from trtllm_core.checkpoint.tokenizer import TokenizerFiles

INDEX = "model.safetensors.index.json"


class HFCheckpoint(Checkpoint):
    """A directory with ``config.json`` and safetensors, in one file or in shards named by an index.

    Args:
        path: the directory.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or the weights are not in safetensors.
    """

    format: ClassVar[Literal["hf", "gguf"]] = "hf"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._config = read_object(path / "config.json")
        self._shards: dict[str, Any] = {}
        self._nbytes = 0
        for shard in _shards(path):
            handle = open_safetensors(shard)
            self._shards.update(dict.fromkeys(handle.keys(), handle))
            self._nbytes += shard.stat().st_size - _header_bytes(shard)
        _check_index(path, self._shards)

    @property
    def architecture(self) -> str:
        """The first of config.json's ``architectures``.

        Raises:
            CheckpointError: config.json names none.
        """
        names = self._config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.path / 'config.json'} has no 'architectures': add the name of the model class, such as "
                '"architectures": ["LlamaForCausalLM"].'
            )
        return names[0]

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def names(self) -> frozenset[str]:
        return frozenset(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shard(name).get_slice(name).get_shape())

    def stored(self, name: str) -> str:
        return str(self._shard(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        # For torch on the CPU, safetensors gives views of one storage over the mapped file: nothing is copied.
        tensor: torch.Tensor = self._shard(name).get_tensor(name)
        return tensor

    def tokenizer(self) -> TokenizerFiles | None:
        from trtllm_core.checkpoint.hf_tokenizer import read_hf_tokenizer

        return read_hf_tokenizer(self.path)

    def _shard(self, name: str) -> Any:
        try:
            return self._shards[name]
        except KeyError:
            raise self._unknown(name) from None


def has_safetensors(path: Path) -> bool:
    """Whether a directory holds safetensors files, or an index of some."""
    return (path / INDEX).exists() or any(path.glob("*.safetensors"))


def _shards(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        shards = [path / name for name in sorted(set(_weight_map(path).values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise CheckpointError(
                f"{path / INDEX} names {listing(missing)}, which the directory lacks: download the checkpoint again."
            )
        return shards
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files but no {INDEX} that says which belong to the model: add it, "
            f"or name the one file model.safetensors."
        )
    return found


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no 'weight_map': download the checkpoint again.")
    return weight_map


def _check_index(path: Path, tensors: Mapping[str, Any]) -> None:
    if not (path / INDEX).exists():
        return
    absent = sorted(set(_weight_map(path)) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{path / INDEX} lists {len(absent)} tensors that its shards lack, the first being {absent[0]!r}: "
            f"index and shards are of different checkpoints; download it again."
        )


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened for torch on the CPU: its tensors are views of the mapped file.

    Raises:
        CheckpointError: it is truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again.") from None


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:  # a safetensors file begins with the length of its JSON header, as a uint64
        return 8 + int.from_bytes(file.read(8), "little")
