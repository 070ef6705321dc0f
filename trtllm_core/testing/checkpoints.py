"""Tiny checkpoints with random weights, written in a few milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_llama(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A LLaMA checkpoint in Hugging Face's layout, two layers, float32; ``changes`` are fields of its config.json.

    Weights are large enough for attention to choose, so that a wrong mask, position or head shows in the logits.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: (1 + 0.2 * torch.randn(shape, generator=random) if "norm" in name else _random(shape, random)).to(dtype)
        for name, shape in _shapes(config).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _random(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random) * (1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.5)


def _shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        layer, attention, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        out |= {f"{layer}input_layernorm.weight": (hidden,), f"{layer}post_attention_layernorm.weight": (hidden,)}
        linears = {
            f"{attention}q_proj": (heads, hidden),
            f"{attention}k_proj": (kv_heads, hidden),
            f"{attention}v_proj": (kv_heads, hidden),
            f"{attention}o_proj": (hidden, heads),
            f"{mlp}gate_proj": (inner, hidden),
            f"{mlp}up_proj": (inner, hidden),
            f"{mlp}down_proj": (hidden, inner),
        }
        for name, shape in linears.items():
            out[f"{name}.weight"] = shape
            if c["attention_bias"] if name.startswith(attention) else c["mlp_bias"]:
                out[f"{name}.bias"] = shape[:1]
    out["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], hidden)
    return out


def write_byte_tokenizer(directory: Path, vocab_size: int = 256) -> None:
    """A tokenizer of single bytes for a checkpoint: two bytes that UTF-8 never has give their ids to ``<s>`` (254) and
    ``</s>`` (255). transformers reads it too."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 2]
    vocab = {character: number for number, character in enumerate(alphabet)}
    specials = {"<s>": vocab_size - 2, "</s>": vocab_size - 1}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={**vocab, **specials}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


def write_lora(directory: Path, layers: dict[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> Path:
    """A random PEFT adapter. ``layers`` are names of a model's linear layers, with their input and output features."""
    directory.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _random((rank, inputs), random)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _random((outputs, rank), random)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
