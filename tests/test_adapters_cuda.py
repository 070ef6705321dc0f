"""Adapters, prompt tables and gathered logits on a GPU equal those on the CPU: ``pytest -m cuda``."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine
from trtllm_core.testing.checkpoints import write_llama, write_lora

VOCAB = 67
PROMPTS = [[5, 9, 13], [VOCAB, VOCAB + 1, VOCAB + 2, 5], [1, VOCAB + 2, 3, 60], [30] * 40, [VOCAB + 1] * 9, [7]]
CONFIG = SamplingConfig(end_id=(), max_new_tokens=24, return_dict=True, prompt_logprobs=2)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_the_gpu_equals_the_cpu(tmp_path, dtype, tolerance):
    plugins = Plugins.load()
    build = BuildConfig(
        dtype=dtype,
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=24,
        tokens_per_block=16,
        gather_context_logits=True,
        gather_generation_logits=True,
        max_prompt_embedding_table_size=8,
        max_lora_rank=8,
    )
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", build, plugins=plugins)
    layers = {f"model.layers.{i}.self_attn.{part}_proj": (32, n) for i in (0, 1) for part, n in (("q", 32), ("v", 16))}
    more = {f"model.layers.{i}.mlp.down_proj": (44, 32) for i in (0, 1)}
    paths = [write_lora(tmp_path / "a", layers, seed=1), write_lora(tmp_path / "b", layers | more, rank=8, seed=2)]
    table = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    here, there = [], []
    for device, outputs in (("cpu", here), ("cuda", there)):
        with ModelRunner.from_dir(tmp_path / "engine", plugins=plugins, lora_dir=paths, device=device) as runner:
            options = {"prompt_table": table.to(device), "prompt_tasks": "0,1,0,0,1,0"}
            uids = ["0", None, "1", "1", "0", "-1"]
            outputs += runner.generate(PROMPTS, CONFIG, lora_uids=uids, **options)["outputs"]
    largest = max(float(one.context_logits.abs().max()) for one in here)
    for a, b in zip(here, there, strict=True):
        assert (a.context_logits - b.context_logits).abs().max() < tolerance * largest
        if dtype == "float32":
            assert a.tokens == b.tokens
            assert (a.generation_logits - b.generation_logits).abs().max() < tolerance * largest
            assert a.prompt_log_probs == pytest.approx(b.prompt_log_probs, abs=1e-3)
