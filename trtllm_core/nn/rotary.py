"""Rotary position embedding and the ways of stretching it.

Sources of the formulas: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), NTK-aware "dynamic" scaling
as published with it, YaRN (2309.00071), LongRoPE (2402.13753) as Phi-3 uses it, and the frequency rule of LLaMA 3.1's
reference implementation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from trtllm_core.config import Config
from trtllm_core.nn.layer import Layer


class RotaryScaling(Config):
    """``rope_scaling`` of a checkpoint, in the fields that Hugging Face configs use."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope", "factors"] = "none"
    factor: float = Field(default=1.0, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = Field(
        default=(), description="kinds 'factors' and 'longrope': divides each of the dim / 2 frequencies"
    )
    long_factors: tuple[float, ...] = Field(
        default=(), description="kind 'longrope': the factors of an engine for more than the original positions"
    )


def _yarn_ramp(scaling: RotaryScaling, dim: int, base: float, original: int) -> torch.Tensor:
    """float32 ``[dim / 2]``: 0 where a frequency is interpolated, 1 where it is kept."""

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_to_dim(scaling.beta_fast), turns_to_dim(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1 - ramp


def inverse_frequencies(
    dim: int, base: float, scaling: RotaryScaling, max_position_embeddings: int, positions: int
) -> tuple[torch.Tensor, float]:
    """Radians a token, and the factor on cosine and sine.

    float32 ``[dim / 2]``, or ``[positions, dim / 2]`` for ``dynamic`` scaling, whose base grows with the length of
    the sequence: each token has the base of a sequence that ends with it, as in step-by-step generation, so that a
    token's rotation never depends on how its sequence was cut into calls. ``longrope`` has factors for short and for
    long sequences; for the same reason ``positions``, the longest sequence that an engine serves, decides between them.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    original = scaling.original_max_position_embeddings or max_position_embeddings
    if scaling.kind == "dynamic":
        lengths = torch.arange(1, positions + 1, dtype=torch.float32).clamp(min=original)
        stretch = scaling.factor * lengths / original - (scaling.factor - 1)
        return 1.0 / (base * stretch ** (dim / (dim - 2)))[:, None] ** exponents, 1.0
    frequencies = 1.0 / base**exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors), 1.0
    if scaling.kind == "longrope":
        factors = scaling.long_factors if positions > original else scaling.factors
        return frequencies / torch.tensor(factors), scaling.attention_factor or 1.0
    if scaling.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        return frequencies * ((1 - smooth) / scaling.factor + smooth), 1.0
    if scaling.kind == "yarn":
        kept = _yarn_ramp(scaling, dim, base, original)
        return frequencies / scaling.factor * (1 - kept) + frequencies * kept, _yarn_attention_factor(scaling)
    return frequencies, 1.0


def _yarn_attention_factor(scaling: RotaryScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


class RotaryEmbedding(Layer):
    """Cosines and sines of positions, for the first ``dim`` elements of each head.

    The table is computed when the engine is loaded, as long as its longest sequence, from float32 angles. A module
    makes one and gives it to all its attention layers; contexts look its rows up once a call.

    Elements i and ``i + dim / 2`` of a head turn together. A model that turns neighbours (2i, 2i + 1) has its rows of q
    and k put in that order by its weight map.
    """

    def __init__(
        self, dim: int, base: float, max_position_embeddings: int, scaling: RotaryScaling | None = None
    ) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.max_position_embeddings = max_position_embeddings
        self.scaling = scaling or RotaryScaling()
        self.table: torch.Tensor | None = None

    def prepare(self, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the table ``[positions, 2 * dim]``: cosines, then sines with the sign of the rotation."""
        frequencies, factor = inverse_frequencies(
            self.dim, self.base, self.scaling, self.max_position_embeddings, positions
        )
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.table = torch.cat((cos, cos, -sin, sin), dim=-1).to(device, dtype)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``positions [...] ->`` cosines and signed sines, each ``[..., 1, dim]``."""
        assert self.table is not None, "prepare() comes first"
        cos, sin = self.table[positions].unsqueeze(-2).chunk(2, dim=-1)
        return cos, sin


def rotate_(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first ``heads`` heads of ``x [..., all_heads, head_size]`` by halves, in place, and return ``x``.

    ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)``, the halves of a head's first ``dim`` elements; the others stay.
    ``sin`` is signed, as ``RotaryEmbedding`` gives it, so that swapping the halves is all that is left to do. Queries
    and keys of a fused product turn in one call.
    """
    dim = cos.shape[-1]
    turned = x[..., :heads, :] if dim == x.shape[-1] else x[..., :heads, :dim]
    torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin, out=turned)
    return x
