"""LoRA adapters as Hugging Face PEFT saves them: a directory with ``adapter_config.json`` and safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_core.checkpoint.hf import open_safetensors
from trtllm_core.checkpoint.jsonfile import read_object
from trtllm_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"})
"""Fields of the config that are honoured."""

SETTLED = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        *("lora_dropout", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("loftq_config", "qalora_group_size", "megatron_core", "fan_in_fan_out"),
    }
)
"""Fields that need no honouring: of training, or said again by the tensors and by the model's own weight map."""

REFUSED = {
    "use_dora": "weight-decomposed adapters (DoRA)",
    "modules_to_save": "whole layers that replace the model's",
    "bias": "biases that replace the model's",
    "lora_bias": "biases of the low-rank products",
    "trainable_token_indices": "embeddings that replace the model's",
    "target_parameters": "parameters outside linear layers",
    "layer_replication": "layers that are there several times",
}
"""Fields whose meaning is known and not honoured, and what they ask for."""

UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` with which training leaves the model's own weights as they are."""

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one linear layer of the checkpoint's model: ``scaling * b @ a @ x``."""

    a: torch.Tensor
    """``[rank, in]``, on the CPU."""
    b: torch.Tensor
    """``[out, rank]``, on the CPU."""
    scaling: float


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter, its tensors still in the mapped file."""

    path: Path
    pairs: Mapping[str, LoraPair]
    """By the layer's name in the model that was trained, such as ``model.layers.0.self_attn.q_proj``."""

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(pair.a.shape[0] for pair in self.pairs.values())


def read_peft(path: Path | str) -> PeftAdapter:
    """Read an adapter's directory.

    Raises:
        CheckpointError: it is no LoRA adapter, is damaged, or asks for something that is not honoured here.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} holds no adapter: {CONFIG} is not there")
    config = read_object(path / CONFIG)
    _check(path, config)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path / WEIGHTS} is missing: save the adapter with save_pretrained, as safetensors")
    file = open_safetensors(path / WEIGHTS)
    sides: dict[str, dict[str, Any]] = {}
    for name in file.keys():  # noqa: SIM118
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path / WEIGHTS} holds {name!r}, which is no low-rank factor of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = file.get_tensor(name)
    if not sides:
        raise CheckpointError(f"{path / WEIGHTS} is empty")
    return PeftAdapter(path, {module: _pair(path, module, pair, config) for module, pair in sorted(sides.items())})


def _check(path: Path, config: Mapping[str, Any]) -> None:
    where = path / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} has peft_type {kind!r}: only LORA adapters are read")
    for name, value in sorted(config.items()):
        if not value or (name == "bias" and value == "none") or name in READ or name in SETTLED:
            continue
        what = REFUSED.get(name, "something that this version does not know")
        raise CheckpointError(f"{where} has {name}={value!r}: {what}, which is not supported")
    start = config.get("init_lora_weights")
    if start not in UNCHANGED:
        raise CheckpointError(
            f"{where} has init_lora_weights={start!r}, which changes the model's own weights: save the adapter with "
            "peft's path_initial_model_for_weight_conversion first"
        )


def _pair(path: Path, module: str, sides: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LoraPair:
    if len(sides) < 2:
        (there,) = sides
        raise CheckpointError(f"{path / WEIGHTS}: {module!r} has lora_{there} and not the other factor")
    a, b = sides["A"], sides["B"]
    rank = _pattern(path, config, "rank_pattern", module, config.get("r"))
    if a.dim() != 2 or b.dim() != 2:
        raise CheckpointError(f"{path / WEIGHTS}: {module!r} is no linear layer: its factors are not matrices")
    if not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(
            f"{path / WEIGHTS}: {module!r} has factors {list(a.shape)} and {list(b.shape)}, where {CONFIG} says "
            f"rank {rank}"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise CheckpointError(f"{path / WEIGHTS}: {module!r} is of {a.dtype} and {b.dtype}, not floating-point numbers")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise CheckpointError(f"{path / WEIGHTS}: {module!r} has values that are not finite")
    alpha = _pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path / CONFIG} has lora_alpha={alpha!r}, which is no number")
    return LoraPair(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(path: Path, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot on."""
    patterns = config.get(field) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (AttributeError, re.error) as error:
        raise CheckpointError(f"{path / CONFIG} has {field}={patterns!r}, which maps no patterns: {error}") from None
    return default
