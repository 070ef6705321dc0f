"""All configs: frozen pydantic models that refuse unknown fields. Imports no torch."""

from trtllm_core.config.base import Config
from trtllm_core.config.engine import (
    FORMAT_VERSION,
    BuildConfig,
    EngineConfig,
    KVCacheConfig,
    LoraLayer,
    Provider,
    RankFile,
)
from trtllm_core.config.executor import ExecutorConfig
from trtllm_core.config.mapping import Mapping, WorldConfig
from trtllm_core.config.model import DType, ModelConfig
from trtllm_core.config.quantization import Quantization, QuantizationConfig, QuantizedLayer
from trtllm_core.config.sampling import PluginUse, SamplingConfig, use, with_fields

__all__ = [
    "FORMAT_VERSION",
    "BuildConfig",
    "Config",
    "DType",
    "EngineConfig",
    "ExecutorConfig",
    "KVCacheConfig",
    "LoraLayer",
    "Mapping",
    "ModelConfig",
    "PluginUse",
    "Provider",
    "Quantization",
    "QuantizationConfig",
    "QuantizedLayer",
    "RankFile",
    "SamplingConfig",
    "WorldConfig",
    "use",
    "with_fields",
]
