"""A small random model as transformers has it, and the engines made of it: what a model family is held against."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.engine.load import load_engine
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session

STEPS = 32
"""Tokens of each prompt that are decoded one by one."""
LENGTHS = (5, 1, 23, 40)
"""Tokens of the prompts before those."""
LIMITS = BuildConfig(max_batch_size=8, max_input_len=90, max_seq_len=96, max_num_tokens=512, tokens_per_block=8)


class ReferenceModel:
    """One random model: transformers' own, its directory, and engines made of that.

    Args:
        config: a transformers config; its vocabulary and sizes should be small.
        directory: where checkpoint and engines go.
        plugins: where the family is looked up.
        gain: how large weights are: from about 1 on attention chooses, so that a wrong mask, position or head shows;
            larger ones magnify the rounding of half precision.
        limits: of the engines.
    """

    def __init__(
        self, config: Any, directory: Path, plugins: Plugins, gain: float = 1.5, limits: BuildConfig = LIMITS
    ) -> None:
        import transformers

        self.path, self.plugins, self.limits = directory / "hf", plugins, limits
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(self.model, gain)
        self.model.save_pretrained(self.path)

    def engine(self, dtype: str | None = None, tp_size: int = 1, **limits: Any) -> Path:
        """Directory of the engine, built once. ``limits`` are fields of the build that differ from the others'."""
        path = self.path.with_name("-".join(map(str, ("engine", dtype, tp_size, *limits.values()))))
        if not path.exists():
            build = self.limits.replace(dtype=dtype, tp_size=tp_size, **limits)
            build_engine(self.path, path, build, plugins=self.plugins)
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

    def half(self, dtype: str) -> Any:
        """transformers' model with its weights rounded to ``dtype``, in which it computes."""
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=getattr(torch, dtype), attn_implementation="eager"
        )

    def rounded(self, dtype: str) -> list[torch.Tensor]:
        """Logits of every prompt in float32 arithmetic on weights that were rounded to ``dtype``."""
        return oracle(self.half(dtype).float(), self.prompts)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Ragged token ids, each with ``STEPS`` more to decode."""
        rng = random.Random(1)
        return [[rng.randrange(self.model.config.vocab_size) for _ in range(n + STEPS)] for n in LENGTHS]

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """transformers' logits at every position, sequence by sequence."""
        return oracle(self.model, self.prompts)


def reference_models(
    make: Callable[..., Any], folder: Callable[[str], Path], plugins: Plugins, default: str = ""
) -> Callable[..., ReferenceModel]:
    """``tiny(kind, gain, **changes)``: the reference model of ``make(kind, **changes)``, made once each.

    Args:
        make: gives a transformers config.
        folder: gives a new folder by a name, as ``tmp_path_factory.mktemp``.
        plugins: where the family is looked up.
        default: the kind where none is given.
    """
    made: dict[str, ReferenceModel] = {}

    def tiny(kind: str = default, gain: float = 1.5, **changes: Any) -> ReferenceModel:
        key = f"{kind} {gain} {sorted(changes.items())}"
        if key not in made:
            made[key] = ReferenceModel(make(kind, **changes), folder(kind), plugins, gain)
        return made[key]

    return tiny


def randomise(
    model: torch.nn.Module, gain: float, noise_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like
) -> None:
    """Weights large enough for attention to choose and for biases and norms to matter; the default ones hide bugs.

    ``noise_like`` gives standard normal numbers in the shape of a parameter.
    """
    for module in model.modules():
        norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False):
            noise = noise_like(parameter)
            if norm and name == "weight":
                parameter.data = 1 + 0.2 * noise
            elif parameter.dim() > 1:
                fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[-1]
                parameter.data = noise * (gain / fan_in**0.5)
            else:
                parameter.data = 0.5 * noise
    model.tie_weights()  # type: ignore[operator]


@torch.inference_mode()
def oracle(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """transformers' logits ``[tokens, vocab_size]`` of each prompt."""
    return [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]


@torch.inference_mode()
def virtual_oracle(model: Any, ids: Sequence[int], rows: torch.Tensor | None) -> torch.Tensor:
    """transformers' logits ``[tokens, vocab_size]`` of a prompt whose ids from ``vocab_size`` on stand for ``rows``."""
    if rows is None:
        return oracle(model, [ids])[0]
    tokens, first = torch.tensor([ids]), model.config.vocab_size
    embeddings = model.get_input_embeddings()(tokens.where(tokens < first, 0))
    embeddings[tokens >= first] = rows[tokens[tokens >= first] - first].to(embeddings)
    return model(inputs_embeds=embeddings, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest absolute logit."""
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert difference == difference, "NaN"
    return difference / max(b.abs().max().item() for b in theirs)
