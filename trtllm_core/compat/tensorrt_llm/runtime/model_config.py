"""The classic ``ModelConfig``: what an engine is, as scripts described it to ``GenerationSession``."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtllm_core.compat.tensorrt_llm._utils import torch_dtype_to_str
from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.quantization import QuantMode
from trtllm_core.errors import ConfigError
from trtllm_core.properties import EngineProperties


@dataclass
class ModelConfig:
    """Names, positions and defaults are the classic ones. Heads and hidden size are those of one rank."""

    max_batch_size: int
    max_beam_width: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    gpt_attention_plugin: bool
    remove_input_padding: bool = False
    model_name: str = ""
    paged_kv_cache: bool = False
    cross_attention: bool = False
    head_size: int | None = None
    has_position_embedding: bool = True
    has_token_type_embedding: bool = False
    tokens_per_block: int = 64
    max_prompt_embedding_table_size: int = 0
    quant_mode: QuantMode = field(default_factory=lambda: QuantMode(0))
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    dtype: str = ""
    use_custom_all_reduce: bool = False
    lora_plugin: bool = False
    lora_target_modules: list[str] = field(default_factory=list)
    use_context_fmha_for_generation: bool = False
    trtllm_modules_to_hf_modules: dict[str, str] | None = None
    skip_cross_qkv: bool = False
    num_medusa_heads: int = 0
    max_medusa_tokens: int = 0
    mamba_d_state: int = 0
    mamba_d_conv: int = 0
    mamba_expand: int = 0
    paged_state: bool = True
    mamba_conv1d_plugin: bool = True
    conv_kernel: int = 0
    layer_types: list[str] = field(default_factory=list)
    rnn_hidden_size: int = 0


MUST_FIT = ("vocab_size", "num_heads", "hidden_size", "head_size", "dtype")
"""Fields that an engine has, too. Layout (padding, paging, blocks) is the engine's own, and need not be known."""


def check_model_config(config: ModelConfig, engine: EngineProperties) -> None:
    """Hold a description against the engine.

    Raises:
        ConfigError: the engine is of another model, or lacks what the description says.
    """
    refuse(
        "ModelConfig",
        cross_attention=config.cross_attention,
        has_token_type_embedding=config.has_token_type_embedding,
        num_medusa_heads=config.num_medusa_heads,
        mamba_d_state=config.mamba_d_state,
        rnn_hidden_size=config.rnn_hidden_size,
    )
    expected = {name: getattr(engine, name) for name in MUST_FIT}
    expected["dtype"] = torch_dtype_to_str(engine.dtype)
    expected |= {"num_kv_heads": engine.num_heads_kv, "num_layers": engine.config.model.num_layers}
    most = {"max_batch_size": engine.config.build.max_batch_size, "max_beam_width": engine.config.build.max_beam_width}
    given = {name: getattr(config, name) for name in (*expected, *most)}
    wrong = [
        f"{name} {given[name]} (the engine has {value})"
        for name, value in expected.items()
        if given[name] not in (None, "", value)
    ]
    wrong += [f"{name} {given[name]} (the engine has {value})" for name, value in most.items() if given[name] > value]
    wrong += [
        f"{name} (the engine has none)"
        for name in ("gather_context_logits", "gather_generation_logits", "lora_plugin")
        if getattr(config, name) and not getattr(engine, name.replace("lora_plugin", "use_lora_plugin"))
    ]
    if wrong:
        raise ConfigError(f"ModelConfig does not describe this engine: {', '.join(wrong)}")
