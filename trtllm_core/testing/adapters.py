"""Random LoRA adapters of a random model, as peft makes, saves and runs them: what adapters here are held against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.lora import LoraManager
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins
from trtllm_core.runner import ModelRunner
from trtllm_core.session import Session
from trtllm_core.testing.packed import PackedRows
from trtllm_core.testing.reference import virtual_oracle


class AdaptedModel:
    """A model of transformers with adapters of peft. The model that is given stays as it is.

    Args:
        model: of transformers.
        directory: where adapters are saved.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        self._model, self._directory = model, directory
        self._adapted: dict[str, Any] = {}

    def add(self, name: str, targets: Sequence[str] | str, rank: int = 4, **fields: Any) -> Path:
        """Make an adapter with random factors, and save it. ``fields`` are those of ``peft.LoraConfig``.

        Returns:
            Its directory.
        """
        import peft

        given = targets if isinstance(targets, str) else list(targets)
        config = peft.LoraConfig(r=rank, target_modules=given, init_lora_weights=False, **{"lora_alpha": 8, **fields})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft tells what it does about GPT-2's transposed weights
            # A model for each: peft's files of several adapters in one model mix up names that contain each other.
            adapted = peft.get_peft_model(copy.deepcopy(self._model), config).eval()
            adapted.save_pretrained(self._directory / name)
        self._adapted[name] = adapted
        return self._directory / name

    def logits(self, name: str | None, ids: Sequence[int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """``[tokens, vocab_size]`` of a prompt, with an adapter or with none; see ``virtual_oracle``."""
        return virtual_oracle(self._model if name is None else self._adapted[name], ids, rows)

    def greedy(self, name: str | None, ids: Sequence[int], count: int, rows: torch.Tensor | None = None) -> list[int]:
        """The ``count`` tokens of the largest logits that follow a prompt, by whole passes."""
        text = list(ids)
        for _ in range(count):
            text.append(int(self.logits(name, text, rows)[-1].argmax()))
        return text[len(ids) :]


def adapted_logits(
    session: Session,
    plugins: Plugins,
    adapters: Sequence[Path],
    choices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    steps: int,
    parallel: TensorParallel | None = None,
) -> list[torch.Tensor]:
    """Logits ``[tokens, vocab_size]`` of each prompt: its last ``steps`` tokens one by one, what is before at once.

    Args:
        adapters: directories; loaded in this order.
        choices: of each prompt, the index of its adapter, -1 for none.
    """
    manager = LoraManager(session, plugins, parallel)
    for i, path in enumerate(adapters):
        manager.add(str(i), path)
    rows = PackedRows(session, len(prompts))
    rows.lora_ids[:] = choices
    first = rows.run({row: ids[: len(ids) - steps] for row, ids in enumerate(prompts)})
    later = rows.steps({row: ids[len(ids) - steps :] for row, ids in enumerate(prompts)})
    return [torch.cat((first[row], later[row])) for row in first]


def adapted_rank_logits(
    parallel: TensorParallel,
    engines: Sequence[tuple[Path, Sequence[Path]]],
    choices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    steps: int,
) -> list[list[torch.Tensor]]:
    """For ``trtllm_core.parallel.run_ranks``: what this rank answers for each engine, see ``adapted_logits``."""
    plugins = Plugins.load()
    out = []
    for engine, adapters in engines:
        session = Session.from_directory(engine, parallel.rank, plugins=plugins, parallel=parallel)
        out.append(adapted_logits(session, plugins, adapters, choices, prompts, steps, parallel))
    return out


def adapted_rank_tokens(
    parallel: TensorParallel,
    engine: Path,
    adapters: Sequence[Path],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    options: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    """For ``trtllm_core.parallel.run_ranks``: what this rank generates; ``options`` are those of ``generate``."""
    with ModelRunner.from_dir(engine, parallel.rank, lora_dir=adapters, parallel=parallel) as runner:
        return [output.tokens for output in runner.generate(prompts, sampling, **options)["outputs"]]
