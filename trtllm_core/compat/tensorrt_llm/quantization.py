"""``QuantMode``, for scripts that ask."""

from trtllm_core.config.quant_mode import QuantMode

__all__ = ["QuantMode"]
