"""How Hugging Face configs write down a rotary embedding, in the spellings of old and new transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_core.errors import CheckpointError
from trtllm_core.nn.rotary import RotaryScaling

_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """What a ``config.json`` says of rotary positions."""

    theta: float
    """The base of the wavelengths."""
    fraction: float
    """The rotated part of a head."""
    scaling: RotaryScaling


def read_rope(config: Mapping[str, Any], positions: int) -> Rope:
    """Read ``rope_parameters``, or what was before it: ``rope_theta`` or ``rotary_emb_base``, ``partial_rotary_factor``
    or ``rotary_pct``, and ``rope_scaling``.

    Args:
        config: the parsed ``config.json``.
        positions: its ``max_position_embeddings``.

    Raises:
        CheckpointError: a kind of scaling that is not known, or one that lacks its factors.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}

    def field(name: str, old: str, default: float) -> float:
        found = (rope.get(name), config.get(name), config.get(old), default)
        return next(float(value) for value in found if value is not None)

    return Rope(
        theta=field("rope_theta", "rotary_emb_base", 10000.0),
        fraction=field("partial_rotary_factor", "rotary_pct", 1.0),
        scaling=_scaling(rope, config, positions),
    )


def longest_sequence(positions: int, scaling: RotaryScaling) -> int:
    """The longest sequence that a model serves: some ways of scaling stretch what it was first trained for."""
    if scaling.kind not in ("linear", "dynamic", "yarn"):
        return positions
    return max(positions, int((scaling.original_max_position_embeddings or positions) * scaling.factor))


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any], positions: int) -> RotaryScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RotaryScaling()
    if kind == "su" or "long_factor" in rope:  # what early Phi-3 checkpoints call it
        kind = "longrope"
    if kind not in _KINDS:
        raise CheckpointError(f"rope scaling {kind!r} is not supported ({', '.join(_KINDS)} are)")
    if kind == "longrope":
        return _longrope(rope, config, positions)
    known = {k: v for k, v in rope.items() if k in RotaryScaling.model_fields and v is not None}
    original = known.setdefault("original_max_position_embeddings", positions)
    if kind == "dynamic":
        known["original_max_position_embeddings"] = positions
    if kind == "yarn":
        known.setdefault("factor", positions / original)
    if "factor" not in known:
        raise CheckpointError(f"rope scaling {kind!r} in config.json lacks its factor")
    return RotaryScaling(kind=kind, **known)


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any], positions: int) -> RotaryScaling:
    if not rope.get("short_factor") or not rope.get("long_factor"):
        raise CheckpointError("rope scaling 'longrope' in config.json lacks its short_factor or long_factor")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return longrope(
        rope["short_factor"], rope["long_factor"], original or positions, positions,
        factor=rope.get("factor"), attention_factor=rope.get("attention_factor"),
    )  # fmt: skip


def longrope(
    short: list[float], long: list[float], original: int, positions: int, *,
    factor: float | None = None, attention_factor: float | None = None,
) -> RotaryScaling:  # fmt: skip
    """LongRoPE's scaling; what is not given is derived as its authors do.

    Args:
        short: factors for sequences up to ``original``.
        long: factors for longer ones.
        original: positions that the model was first trained for.
        positions: that it was stretched to.
        factor: how much that is; ``positions / original``.
        attention_factor: on cosines and sines.
    """
    stretch = factor or positions / original
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return RotaryScaling(
        kind="longrope",
        factor=stretch,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        factors=tuple(short),
        long_factors=tuple(long),
    )
