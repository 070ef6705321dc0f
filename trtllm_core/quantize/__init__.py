"""Weights as small numbers: rounding, GGUF's own codes, and what the codes are worth. One module for every backend."""

from trtllm_core.quantize.float8 import float8_rows
from trtllm_core.quantize.gguf import GGUF_BITS, from_gguf
from trtllm_core.quantize.plan import plan_quantization
from trtllm_core.quantize.rounding import quantize
from trtllm_core.quantize.weight import QuantizedWeight, part_shapes

__all__ = ["GGUF_BITS", "QuantizedWeight", "float8_rows", "from_gguf", "part_shapes", "plan_quantization", "quantize"]
