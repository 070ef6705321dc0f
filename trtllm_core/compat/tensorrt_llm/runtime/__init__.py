"""``tensorrt_llm.runtime``, as scripts import it."""

from trtllm_core.compat.tensorrt_llm.gone import gone
from trtllm_core.compat.tensorrt_llm.runtime.generation import (
    GenerationSequence,
    GenerationSession,
    KVCacheManager,
    LogitsProcessor,
    LogitsProcessorList,
    ModelConfig,
    SamplingConfig,
    Session,
    StoppingCriteria,
    StoppingCriteriaList,
    TensorInfo,
    decode_words_list,
    to_word_list_format,
)
from trtllm_core.compat.tensorrt_llm.runtime.model_runner import ModelRunner
from trtllm_core.compat.tensorrt_llm.runtime.model_runner_cpp import ModelRunnerCpp

PYTHON_BINDINGS = True
"""Whether there is a ``ModelRunnerCpp``."""

_OLD = "its models are not among the families of trtllm-core"
ChatGLMGenerationSession = gone("tensorrt_llm.runtime.ChatGLMGenerationSession", _OLD)
QWenForCausalLMGenerationSession = gone("tensorrt_llm.runtime.QWenForCausalLMGenerationSession", _OLD)
MambaLMHeadModelGenerationSession = gone("tensorrt_llm.runtime.MambaLMHeadModelGenerationSession", _OLD)
EncDecModelRunner = gone("tensorrt_llm.runtime.EncDecModelRunner", "trtllm-core runs decoder-only models")
MultimodalModelRunner = gone("tensorrt_llm.runtime.MultimodalModelRunner", "trtllm-core runs text models")
KVCacheUpdater = gone("tensorrt_llm.runtime.KVCacheUpdater", "KV policies rewind by themselves")

__all__ = [
    "PYTHON_BINDINGS",
    "ChatGLMGenerationSession",
    "EncDecModelRunner",
    "GenerationSequence",
    "GenerationSession",
    "KVCacheManager",
    "KVCacheUpdater",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MambaLMHeadModelGenerationSession",
    "ModelConfig",
    "ModelRunner",
    "ModelRunnerCpp",
    "MultimodalModelRunner",
    "QWenForCausalLMGenerationSession",
    "SamplingConfig",
    "Session",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TensorInfo",
    "decode_words_list",
    "to_word_list_format",
]
