"""LoRA and p-tuning as classic scripts asked for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from trtllm_core import Plugins
from trtllm_core.compat.tensorrt_llm.runtime import ModelRunner, ModelRunnerCpp
from trtllm_core.errors import ConfigError
from trtllm_core.testing.adapters import AdaptedModel
from trtllm_core.testing.reference import LIMITS, ReferenceModel

pytest.importorskip("peft")

VOCAB, HIDDEN, NEW = 67, 32, 6


@pytest.mark.parametrize("runner", [ModelRunner, ModelRunnerCpp])
def test_adapters_and_prompt_tables(runner: type, tmp_path: Path) -> None:
    """``lora_dir``, uids, a table in a file and tasks in a string: what peft and transformers compute."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    limits = LIMITS.replace(max_lora_rank=8, max_loras=2, max_prompt_embedding_table_size=12)
    reference = ReferenceModel(config, tmp_path, Plugins.load(), limits=limits)
    adapted = AdaptedModel(reference.model, tmp_path)
    paths = [adapted.add("0", ["q_proj", "v_proj"], lora_alpha=6)]
    table = torch.randn(3, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "table.npy", table.numpy())
    prompts = [[5, 9, VOCAB + 2], [VOCAB, VOCAB + 1, 5], [30] * 5]
    uids, tasks = ["0", "-1", "0"], [2, 1, 0]

    made = runner.from_dir(engine_dir=reference.engine(), lora_dir=paths, rank=0)
    options = {"lora_uids": uids, "prompt_table": str(tmp_path / "table.npy"), "prompt_tasks": "2,1,0"}
    ids = made.generate([torch.tensor(p) for p in prompts], max_new_tokens=NEW, end_id=-1, **options)
    for row, prompt, uid, task in zip(ids[:, 0].tolist(), prompts, uids, tasks, strict=True):
        expected = adapted.greedy(None if uid == "-1" else uid, prompt, NEW, table[task])
        assert row[len(prompt) : len(prompt) + NEW] == expected
    with pytest.raises(ConfigError, match="prompt_tasks"):
        made.generate(
            [torch.tensor(p) for p in prompts], max_new_tokens=NEW, end_id=-1, **options | {"prompt_tasks": "2"}
        )
