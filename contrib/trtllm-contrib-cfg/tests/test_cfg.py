"""Classifier-free guidance through the kit, and against transformers' on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, UnbatchedClassifierFreeGuidanceLogitsProcessor

from trtllm_contrib_cfg import plugin
from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.checkpoints import write_llama

PROMPTS = [[5, 6, 7, 9], [11], [9, 8, 3, 3, 3, 60, 61, 2, 1, 14, 15]]
NEGATIVE = (40, 41, 42, 43, 44, 45)
LIMITS = BuildConfig(max_batch_size=6, max_input_len=48, max_seq_len=64, max_num_tokens=96, dtype="float32")


class TestGuidance(LogitsProcessorConformance):
    plugin = plugin
    params = ({"scale": 2.0}, {"scale": 0.5, "negative_prompt_ids": (4, 5)}, {"scale": 1.0})
    wrong_params = ({"scale": -1.0}, {"scale": float("nan")}, {"negative_prompt_ids": ("a",)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def runner(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    plugins, folder = Plugins.load(extra=[plugin]), tmp_path_factory.mktemp("engine") / "engine"
    build_engine(checkpoint, folder, LIMITS.replace(backend=request.param), plugins=plugins)
    return ModelRunner.from_dir(folder, plugins=plugins)


def transformers(model: LlamaForCausalLM, prompt: Sequence[int], scale: float, negative: Sequence[int]) -> list[int]:
    """The same greedy request there."""
    ids = torch.tensor([prompt])
    beside = torch.tensor([negative]) if negative else None
    guided = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, unconditional_ids=beside, use_cache=False)
    for _ in range(16):
        token = guided(ids, model(ids).logits[:, -1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("negative", [(), NEGATIVE])
@torch.inference_mode()
def test_it_is_transformers(runner: ModelRunner, checkpoint: Path, negative: tuple[int, ...]) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    greedy = SamplingConfig(max_new_tokens=16, end_id=(), return_dict=True)
    free = [list(output.tokens) for output in runner.generate(PROMPTS, greedy)["outputs"]]
    for scale in (1.7, 4.0):
        guided = greedy.replace(logits_processors=use("cfg", scale=scale, negative_prompt_ids=negative))
        found = [list(output.tokens) for output in runner.generate(PROMPTS, guided)["outputs"]]
        assert found == [transformers(model, prompt, scale, negative) for prompt in PROMPTS]
        assert found != free


def test_what_it_costs_is_planned(runner: ModelRunner) -> None:
    ask = SamplingConfig(max_new_tokens=4, end_id=())
    plan = runner.generation.loop.branches.planner.plan
    guided = ask.replace(logits_processors=use("cfg"))
    assert [(one.name, one.prompts) for one in plan(guided, prompt=[5, 6]).companions] == [("cfg", ((6,),))]
    assert plan(ask.replace(logits_processors=use("cfg", scale=1)), prompt=[5, 6]).companions == ()
    with pytest.raises(CapacityError, match="8 slots, 1 beside each of 4 for the companions of 'cfg'"):
        runner.generate([[5, 6]], guided, top_k=0, num_return_sequences=4)
    with pytest.raises(CapacityError, match="a companion of 'cfg' has 47 tokens"):
        runner.generate(
            [[5, 6]], ask.replace(max_new_tokens=20, logits_processors=use("cfg", negative_prompt_ids=(1,) * 47))
        )
    with pytest.raises(ConfigError, match="negative_prompt"):
        runner.generate([[5, 6]], ask.replace(logits_processors=use("cfg", negative_prompt="no")))
