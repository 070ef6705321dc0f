"""Random weights at published shapes: that the sizes are the published ones, and that nothing needs a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_core.backends.modules import meta_module, parameter_shapes
from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.cli.bench import shapes
from trtllm_core.cli.bench.random_engine import random_runner
from trtllm_core.cli.bench.shapes import SHAPES, find_shape
from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import plan_engine
from trtllm_core.errors import ConfigError
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "pythia-160m": 162_322_944,
    "bloom-560m": 559_214_592,
}
"""As the models' cards count them, a tied head once."""

TINY = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL = ("--repeats", "1", "--new-tokens", "4", "--prompt-len", "5", "--prefill-len", "9", "--batch", "1,3")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape that a test can run."""
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": {**SHAPES["llama-3-8b"], **TINY}})
    return "tiny"


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_shape_has_as_many_parameters_as_the_model(name: str) -> None:
    config, family, _ = plan_engine(find_shape(name), BuildConfig(), Plugins.load())
    sizes = parameter_shapes(meta_module(config, family, TensorParallel())).values()
    assert sum(map(math.prod, sizes)) == PARAMETERS[name]


def test_random_weights_are_the_same_for_a_seed_and_no_number_is_lost(tiny: str) -> None:
    build = BuildConfig(max_batch_size=2, max_input_len=16, max_seq_len=32, dtype="float32")
    first, again, other = (random_runner(tiny, build, "cpu", seed) for seed in (0, 0, 1))
    tokens = [runner.generate([[1, 2, 3]], max_new_tokens=8, end_id=()).tolist() for runner in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    sizes = {name: tuple(one.shape) for name, one in first.session.engine.module.named_parameters()}
    assert sizes["embedding.weight"] == (101, 64)
    assert first.config.source == "tiny"
    assert first.tokenizer is None


def test_options_of_the_backend_reach_random_weights(cli: Callable, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    assemble = TorchBackend.assemble

    def spy(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return assemble(*args, **options)

    monkeypatch.setattr(TorchBackend, "assemble", spy)
    shape = ("bench", "--shape", tiny, "--dtype", "float32", *SMALL, "--no-memory")
    cli(*shape, "--option", "native=false", "--option", "cuda_graphs=false")
    assert seen == {"native": False, "cuda_graphs": False}
    assert "no option 'speed' over random weights" in cli(*shape, "--option", "speed=9", status=2).stderr
    assert "cuda_graphs was asked for" in cli(*shape, "--option", "cuda_graphs=true", status=2).stderr
    assert "NAME=VALUE" in cli(*shape, "--option", "speed", status=2).stderr


def test_bench_of_a_shape(cli: Callable, tiny: str) -> None:
    found = json.loads(cli("bench", "--shape", tiny, "--dtype", "float32", *SMALL, "--no-memory", "--json").stdout)
    assert (found["engine"], found["shape"], found["dtype"]) == (None, "tiny", "float32")
    assert [row["name"] for row in found["rows"]] == ["prefill 9", "decode, batch 1", "decode, batch 3"]
    assert all(row["ours"] > 0 for row in found["rows"])
    assert found["memory"] == {}


@pytest.mark.parametrize("quant", ["int4", "int8", "fp8"])
def test_random_weights_that_are_quantised(quant: str, tiny: str, cli: Callable) -> None:
    """Fewer bytes, and logits that are numbers."""
    limits = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 32}
    plain = random_runner(tiny, BuildConfig(**limits), "cpu")
    runner = random_runner(tiny, BuildConfig(**limits, quantization={"weights": quant}), "cpu")
    assert runner.config.quantization is not None
    assert runner.context_mem_size < plain.context_mem_size
    output = runner.generate([[1, 2, 3]], max_new_tokens=4, end_id=(), return_dict=True, output_log_probs=True)
    assert all(math.isfinite(one) for one in output["outputs"][0].log_probs)
    found = json.loads(cli("bench", "--shape", tiny, *SMALL, "--no-memory", "--json", "--quant", quant).stdout)
    assert found["quantization"] == quant


def test_the_peer_of_a_shape_is_random_too(cli: Callable, tiny: str) -> None:
    peer = ("--peer", "transformers", "--no-memory", "--json")
    found = json.loads(cli("bench", "--shape", tiny, *SMALL, *peer).stdout)
    assert found["dtype"] == "bfloat16"
    assert all(row["ratio"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name an engine, or a shape"),
        (("engine", "--shape", "gpt2"), "name an engine, or a shape"),
        (("engine", "--dtype", "float32"), "an engine has its own"),
        (("engine", "--quant", "int4"), "an engine has its own"),
        (("--shape", "gpt2", "--quant", "int3"), "int3"),
        (("--shape", "llama-9"), "there is no shape 'llama-9' (known: "),
        (("--shape", "gpt2", "--prompt-len", "2000"), "beyond the 1024 positions"),
        (("--shape", "gpt2", "--peer", "llama.cpp"), "reads GGUF files"),
        (("--shape", "gpt2", "--peer", "transformers", "--checkpoint", "x"), "the peer's weights are random too"),
    ],
)
def test_what_a_shape_cannot_be(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(cli("bench", *arguments, status=2).stderr.split())


def test_random_weights_are_for_the_torch_backend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch backend, on one rank"):
        random_runner("smollm2-135m", BuildConfig(tp_size=3, max_seq_len=64), "cpu")
