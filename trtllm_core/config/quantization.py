"""How an engine's weights are quantised: what a build asks for, and what became of each layer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trtllm_core.config.base import Config

Form = Literal["symmetric", "zero_points", "offsets", "float8"]
"""What a code is worth: ``scale * (code - middle)``, ``scale * (code - zero_point)``, ``scale * code + offset``, or,
where codes are floating-point numbers of 8 bits (e4m3), ``scale * code``."""

GROUPS = (32, 64, 128)
"""Neighbouring input features that may share a scale."""


class QuantizationConfig(Config):
    """What a build asks for. Embeddings and norms stay as they are, unless the embedding's table is also the head."""

    weights: Literal["int4", "int8", "fp8", "keep"] = Field(
        description="fp8: e4m3, a scale for each output feature; keep: the codes of a GGUF file, as they are"
    )
    group_size: int | None = Field(
        default=None, description="input features that share a scale: 32 (the default), 64, 128; 0: all of a row, int8"
    )
    symmetric: bool | None = Field(
        default=None, description="int4 without zero points; None: with them where the backend takes them"
    )
    head_bits: Literal[4, 8, 16] | None = Field(
        default=None, description="of the head; 16 leaves it in the engine's dtype; None: 8, or what the file has"
    )

    @model_validator(mode="after")
    def _group(self) -> Self:
        allowed = (*GROUPS, 0) if self.weights == "int8" else GROUPS
        if self.weights != "fp8" and self.group_size is not None and self.group_size not in allowed:
            raise ValueError(f"group_size of {self.weights} is one of {', '.join(map(str, allowed))}")
        if self.weights == "fp8" and self.group_size is not None:
            raise ValueError("fp8 weights have one scale for each output feature: leave group_size out")
        if self.weights == "fp8" and self.symmetric is not None:
            raise ValueError("fp8 weights have no zero points: leave symmetric out")
        if self.weights == "int8" and self.symmetric is False:
            raise ValueError("int8 codes are symmetric: leave symmetric out")
        if self.weights in ("int8", "fp8") and self.head_bits == 4:
            raise ValueError("a head of 4 bits goes with int4")
        if self.weights == "keep":
            for name in ("group_size", "symmetric", "head_bits"):
                if getattr(self, name) is not None:
                    raise ValueError(f"keep takes the file's own codes, so it takes no {name}")
        return self


class QuantizedLayer(Config):
    """How one linear layer's weight is stored."""

    bits: Literal[4, 8]
    group_size: int = Field(gt=0, description="input features that share a scale; all of them: per channel")
    form: Form


class Quantization(Config):
    """What became of the build's wish, by the layers' names in the family's module."""

    weights: Literal["int4", "int8", "fp8", "keep"]
    layers: dict[str, QuantizedLayer]
