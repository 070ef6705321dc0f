"""Where each kind of checkpoint keeps what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtllm_core.config import ModelConfig
from trtllm_core.nn.weights import Transform, chain, halves, of_each_head, rows, transposed
from trtllm_core.plugin import CheckpointView, Piece
from trtllm_plugin_gpt.config import GPTExtras

QKV = Callable[[str, ModelConfig], list[Piece]]
"""``(name of the layer with a dot, config) ->`` the pieces of q, k and v, with names of layers as sources."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of layers in a checkpoint; those below ``layer`` follow it."""

    embedding: str
    layer: str
    attention_norm: str
    qkv: QKV
    output: str
    mlp_norm: str
    up: str
    down: str
    norm: str
    heads: tuple[str, ...]
    """The head, by any of these names. They have no prefix."""
    positions: str = ""
    prefix: str = ""
    """Before all other names, in checkpoints of the whole model; not in those of the model below the head."""
    transform: Transform | None = None
    """Of all linear layers but the head."""


def _gpt2_qkv(layer: str, config: ModelConfig) -> list[Piece]:
    size = config.hidden_size
    return [_piece(f"{layer}attn.c_attn", i, chain(transposed, rows(i * size, size))) for i in range(3)]


def _gptj_qkv(layer: str, config: ModelConfig) -> list[Piece]:
    # Neighbours turn together here.
    order = halves(config.head_size, GPTExtras(**config.extras).rotary_dim)
    return [_piece(f"{layer}attn.{name}_proj", i, order if i < 2 else None) for i, name in enumerate("qkv")]


def _gptneox_qkv(layer: str, config: ModelConfig) -> list[Piece]:
    size = config.head_size
    return [_piece(f"{layer}attention.query_key_value", i, of_each_head(i, 3, size)) for i in range(3)]


def _gguf_qkv(layer: str, config: ModelConfig) -> list[Piece]:
    size = config.hidden_size  # llama.cpp's converter puts q before k before v, whatever the order was
    return [_piece(f"{layer}attn_qkv", i, rows(i * size, size)) for i in range(3)]


def _piece(source: str, part: int, transform: Transform | None) -> Piece:
    return Piece(source, "heads" if part == 0 else "kv_heads", transform)


_GPT2 = Layout(
    prefix="transformer.",
    embedding="wte",
    positions="wpe",
    layer="h.{}.",
    attention_norm="ln_1",
    qkv=_gpt2_qkv,
    output="attn.c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_f",
    heads=("lm_head",),
    transform=transposed,
)
_GPTJ = Layout(
    prefix="transformer.",
    embedding="wte",
    layer="h.{}.",
    attention_norm="ln_1",
    qkv=_gptj_qkv,
    output="attn.out_proj",
    mlp_norm="",
    up="mlp.fc_in",
    down="mlp.fc_out",
    norm="ln_f",
    heads=("lm_head",),
)
_GPTNEOX = Layout(
    prefix="gpt_neox.",
    embedding="embed_in",
    layer="layers.{}.",
    attention_norm="input_layernorm",
    qkv=_gptneox_qkv,
    output="attention.dense",
    mlp_norm="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="final_layer_norm",
    heads=("embed_out", "lm_head"),
)
_GGUF = Layout(
    embedding="token_embd",
    positions="position_embd",
    layer="blk.{}.",
    attention_norm="attn_norm",
    qkv=_gguf_qkv,
    output="attn_output",
    mlp_norm="ffn_norm",
    up="ffn_up",
    down="ffn_down",
    norm="output_norm",
    heads=("output",),
)
_BY_ARCHITECTURE = {"GPT2LMHeadModel": _GPT2, "GPTJForCausalLM": _GPTJ, "GPTNeoXForCausalLM": _GPTNEOX}


def layout_of(checkpoint: CheckpointView) -> Layout:
    """The layout of a checkpoint of this family."""
    return _GGUF if checkpoint.format == "gguf" else _BY_ARCHITECTURE[checkpoint.architecture]
