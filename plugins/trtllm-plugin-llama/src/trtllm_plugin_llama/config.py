"""From a checkpoint's own config to ``ModelConfig`` and this family's extras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from trtllm_core.config import Config, DType, ModelConfig
from trtllm_core.errors import CheckpointError, listing
from trtllm_core.nn.mlp import ACTIVATIONS
from trtllm_core.nn.rotary import RotaryScaling
from trtllm_core.plugin import CheckpointView

_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class LlamaExtras(Config):
    """What only this family needs to know: ``ModelConfig.extras``."""

    intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RotaryScaling = RotaryScaling()
    activation: str = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    windowed_layers: tuple[int, ...] | None = None
    """Layers that have ModelConfig.sliding_window; None: all of them."""


def from_hf(checkpoint: CheckpointView) -> ModelConfig:
    """From a Hugging Face ``config.json``."""
    c = checkpoint.config
    lacking = [name for name in _NEEDED if c.get(name) is None]
    if lacking:
        raise CheckpointError(f"config.json lacks {listing(lacking)}, which family 'llama' needs")
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    positions = c.get("max_position_embeddings", 2048)
    qwen2 = checkpoint.architecture == "Qwen2ForCausalLM"
    scaling = _hf_scaling(_rope(c), positions)
    window = c.get("sliding_window") if _has_window(checkpoint.architecture, c) else None
    activation = c.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act {activation!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    dtype: Any = c.get("torch_dtype") or c.get("dtype")
    extras = LlamaExtras(
        intermediate_size=c["intermediate_size"],
        norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=_rope(c).get("rope_theta", c.get("rope_theta", 10000.0)),
        rope_scaling=scaling,
        activation=activation,
        # Where a checkpoint has a head of its own after all, that head is the one that was trained.
        tied_head=c.get("tie_word_embeddings", False) and "lm_head.weight" not in checkpoint.names(),
        qkv_bias=qwen2 or c.get("attention_bias", False),
        output_bias=not qwen2 and c.get("attention_bias", False),
        mlp_bias=c.get("mlp_bias", False),
        windowed_layers=_windowed(c, layers, qwen2) if window else None,
    )
    return ModelConfig(
        family="llama",
        architecture=checkpoint.architecture,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_size=c.get("head_dim") or c["hidden_size"] // heads,
        max_position_embeddings=_longest(positions, scaling),
        sliding_window=window,
        dtype=dtype if dtype in get_args(DType) else "float32",
        extras=extras.model_dump(mode="json"),
    )


def _has_window(architecture: str, config: Mapping[str, Any]) -> bool:
    """LLaMA itself has none, whatever fields a converted config may carry along."""
    return architecture == "MistralForCausalLM" or (
        architecture == "Qwen2ForCausalLM" and bool(config.get("use_sliding_window", False))
    )


def _longest(positions: int, scaling: RotaryScaling) -> int:
    """The longest sequence that the model serves: these ways of scaling stretch what it was first trained for."""
    if scaling.kind not in ("linear", "dynamic", "yarn"):
        return positions
    return max(positions, int((scaling.original_max_position_embeddings or positions) * scaling.factor))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _windowed(config: Mapping[str, Any], layers: int, qwen2: bool) -> tuple[int, ...] | None:
    types = config.get("layer_types")
    if types:
        return tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return tuple(range(config.get("max_window_layers", layers), layers)) if qwen2 else None


def _hf_scaling(rope: Mapping[str, Any], positions: int) -> RotaryScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RotaryScaling()
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported (linear, dynamic, llama3 and yarn are)")
    known = {k: v for k, v in rope.items() if k in RotaryScaling.model_fields and v is not None}
    original = known.setdefault("original_max_position_embeddings", positions)
    if kind == "dynamic":
        known["original_max_position_embeddings"] = positions
    if kind == "yarn":
        known.setdefault("factor", positions / original)
    if "factor" not in known:
        raise CheckpointError(f"rope scaling {kind!r} in config.json lacks its factor")
    return RotaryScaling(kind=kind, **known)


def from_gguf(checkpoint: CheckpointView) -> ModelConfig:
    """From GGUF metadata."""
    kind = checkpoint.architecture

    def get(key: str, default: Any = None) -> Any:
        value = checkpoint.config.get(f"{kind}.{key}", default)
        if value is None:
            raise CheckpointError(f"the GGUF file lacks the metadata {kind}.{key}")
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    names, scaling = checkpoint.names(), _gguf_scaling(checkpoint)
    extras = LlamaExtras(
        intermediate_size=get("feed_forward_length"),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        tied_head="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
    )
    return ModelConfig(
        family="llama",
        architecture={"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind],
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_size=get("attention.key_length", hidden // heads),
        max_position_embeddings=_longest(get("context_length"), scaling),
        sliding_window=checkpoint.config.get(f"{kind}.attention.sliding_window") or None,
        extras=extras.model_dump(mode="json"),
    )


def _gguf_scaling(checkpoint: CheckpointView) -> RotaryScaling:
    if "rope_freqs.weight" in checkpoint.names():
        return RotaryScaling(kind="factors", factors=tuple(checkpoint.tensor("rope_freqs.weight").tolist()))
    prefix = f"{checkpoint.architecture}.rope.scaling"
    kind = checkpoint.config.get(f"{prefix}.type", "none")
    if kind == "none":
        return RotaryScaling()
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} of GGUF files is not supported (linear and yarn are)")
    factor = checkpoint.config.get(f"{prefix}.factor")
    if factor is None:
        raise CheckpointError(f"the GGUF file lacks the metadata {prefix}.factor")
    original = checkpoint.config.get(f"{prefix}.original_context_length")
    return RotaryScaling(kind=kind, factor=factor, original_max_position_embeddings=original)
