"""The smallest published member of each architecture, in its own shape, with random weights, against transformers.

Small models show every mistake in what is computed; these show that real sizes are served: heads, vocabularies and
depths as they are published, and the rounding of bfloat16 over all layers.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from trtllm_core import ModelRunner, SamplingConfig, build_engine
from trtllm_core.config import BuildConfig
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import distance, oracle, randomise

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("published")]

SHAPES: dict[str, Callable[[], Any]] = {
    "GPT-2 124M": lambda: transformers.GPT2Config(),
    "Pythia-70M": lambda: transformers.GPTNeoXConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_hidden_layers=6,
        vocab_size=50304,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    ),
    "BLOOM-560M": lambda: transformers.BloomConfig(
        hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880, seq_length=2048
    ),
    "SmolLM2-135M": lambda: transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}
STEPS, LENGTHS, NEW = 32, (7, 1, 40), 8
LIMITS = BuildConfig(max_batch_size=4, max_input_len=90, max_seq_len=96, max_num_tokens=256)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For gigabytes: emptied at once, not when pytest forgets the session."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def random_model(config: Any) -> Any:
    """In bfloat16, so that engines of all dtypes have the very same weights."""
    torch.manual_seed(0)
    # A number for each weight would take most of the test's time. A prime length keeps rows from being alike.
    block = torch.randn(16777259)

    def noise_like(parameter: torch.Tensor) -> torch.Tensor:
        start = int(torch.randint(len(block) // 2, ()))
        count = start + parameter.numel()
        noise = block if count <= len(block) else block.repeat(-(-count // len(block)))
        return noise[start:count].view(parameter.shape)

    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.tie_weights()
    randomise(model, 0.6, noise_like)
    for parameter in model.parameters():  # not the buffers: transformers computes rotary angles in float32
        parameter.data = parameter.bfloat16()
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_shape(shape: str, folder: Path) -> None:
    model, plugins = random_model(SHAPES[shape]()), Plugins.load()
    model.save_pretrained(folder / "hf")
    rng = random.Random(0)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(n + STEPS)] for n in LENGTHS]
    expected = oracle(model.float(), prompts)

    build_engine(folder / "hf", folder / "engine", LIMITS.replace(dtype="float32"), plugins=plugins)
    with ModelRunner.from_dir(folder / "engine", plugins=plugins) as runner:
        sampling = SamplingConfig(max_new_tokens=NEW, end_id=(), return_dict=True)
        outputs = runner.generate(prompts, sampling)["outputs"]
        assert distance(prefill_and_decode(runner.session, prompts, STEPS), expected) < 1e-4
    chosen = oracle(model, [ids + list(output.tokens) for ids, output in zip(prompts, outputs, strict=True)])
    for ids, output, logits in zip(prompts, outputs, chosen, strict=True):
        assert list(output.tokens) == logits[len(ids) - 1 : -1].argmax(-1).tolist()
    del model

    build_engine(folder / "hf", folder / "engine", LIMITS.replace(dtype="bfloat16"), plugins=plugins)
    session = Session.from_directory(folder / "engine", plugins=plugins)
    assert 0 < distance(prefill_and_decode(session, prompts, STEPS), expected) < 2e-2
