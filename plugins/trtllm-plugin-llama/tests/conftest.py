"""Tiny random models, as transformers saves and runs them and as engines."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.engine.load import load_engine
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session

STEPS = 32
LENGTHS = (5, 1, 23, 40)
SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
LIMITS = BuildConfig(max_batch_size=8, max_input_len=90, max_seq_len=96, max_num_tokens=512, tokens_per_block=8)
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}


class Tiny:
    """One random model: transformers' own, its directory, and engines made of that."""

    steps, lengths = STEPS, LENGTHS

    def __init__(self, kind: str, directory: Path, plugins: Plugins, gain: float, changes: dict[str, Any]) -> None:
        self.path, self.plugins = directory / "hf", plugins
        config = CONFIGS[kind](**{**SMALL, **changes})
        torch.manual_seed(len(str(changes)))
        self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(self.model, gain)
        self.model.save_pretrained(self.path)

    def engine(self, dtype: str | None = None, tp_size: int = 1) -> Path:
        """Directory of the engine, built once."""
        path = self.path.with_name(f"engine-{dtype}-{tp_size}")
        if not path.exists():
            build_engine(self.path, path, LIMITS.replace(dtype=dtype, tp_size=tp_size), plugins=self.plugins)
        return path

    def session(self, dtype: str | None = None, **options: Any) -> Session:
        """The engine, loaded."""
        return Session.from_directory(self.engine(dtype), plugins=self.plugins, **options)

    def mutant(self, extras: dict[str, Any] | None = None, **model: Any) -> Session:
        """The engine, loaded with a config that says something else: a planted bug."""
        config = self.session().config
        model["extras"] = {**config.model.extras, **(extras or {})}
        wrong: EngineConfig = config.replace(model=config.model.replace(**model))
        return Session(load_engine(self.engine() / "rank0.safetensors", self.plugins, wrong))

    def off(self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor] | None = None) -> float:
        """How far ``ours`` are from transformers' logits, as a share of the largest absolute one."""
        return distance(ours, self.expected if theirs is None else theirs)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Ragged token ids, each with ``STEPS`` more to decode."""
        rng = random.Random(1)
        return [[rng.randrange(self.model.config.vocab_size) for _ in range(n + STEPS)] for n in LENGTHS]

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """transformers' logits at every position, sequence by sequence."""
        return oracle(self.model, self.prompts)


def randomise(model: torch.nn.Module, gain: float) -> None:
    """Weights large enough for attention to choose and for biases and norms to matter; the default ones hide bugs."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
        else:
            scale = gain / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.5
            parameter.data = torch.randn_like(parameter) * scale
    model.tie_weights()  # type: ignore[operator]


@torch.inference_mode()
def oracle(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """transformers' logits ``[tokens, vocab_size]`` of each prompt."""
    return [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest absolute logit."""
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert difference == difference, "NaN"
    return difference / max(b.abs().max().item() for b in theirs)


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


TinyFactory = Callable[..., Tiny]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> TinyFactory:
    """``tiny(kind, **changes of its config) -> Tiny``, made once each."""
    made: dict[str, Tiny] = {}

    def make(kind: str = "llama", gain: float = 1.5, **changes: Any) -> Tiny:
        key = f"{kind} {gain} {sorted(changes.items())}"
        if key not in made:
            made[key] = Tiny(kind, tmp_path_factory.mktemp(kind), plugins, gain, changes)
        return made[key]

    return make
