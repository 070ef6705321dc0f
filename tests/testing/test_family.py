"""The kit of model families passes right families, and each of its checks can fail."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import transformers

from trtllm_core.errors import TrtllmCoreError
from trtllm_core.testing import ModelFamilyConformance
from trtllm_core.testing.family import load_plugins
from trtllm_core.testing.reference import ReferenceModel


class TestLlama(ModelFamilyConformance):
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        attention_bias=True,
    )


class TestBloom(ModelFamilyConformance):
    config = transformers.BloomConfig(vocab_size=67, hidden_size=64, n_layer=2, n_head=4)


LOGITS = {
    "test_prefill",
    "test_ragged_batch",
    "test_chunked_prefill",
    "test_decode",
    "test_greedy_tokens",
    "test_rewind",
    "test_fork",
    "test_tensor_parallel",
    "test_dtypes",
    "test_adapters",
    "test_prompt_tables",
}
BROKEN = {
    "swapped_halves": LOGITS,
    "missing_bias": LOGITS,
    "no_residual": LOGITS,
    "wrong_epsilon": LOGITS,
    "zeroed_bias": {*LOGITS, "test_weight_map"},
    "forgotten_parameter": {*LOGITS, "test_weight_map"},  # no engine is built of it
    "whole_output": {"test_weight_map", "test_tensor_parallel"},
    "reordered_inputs": {"test_adapters"},
    "sized_transform": {"test_adapters"},
    "own_embedding": {"test_prompt_tables"},
    "takes_anything": {"test_an_unknown_tensor_is_refused"},
}
WRONG_ON_TWO_RANKS = {"whole_output", "slopes_of_one_rank"}
BROKEN_BLOOM = {"slopes_in_reverse": LOGITS, "slopes_of_one_rank": {"test_tensor_parallel"}}


@pytest.mark.parametrize("name", [*BROKEN, *BROKEN_BLOOM])
def test_a_broken_family_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    right: type[ModelFamilyConformance] = TestLlama if name in BROKEN else TestBloom

    class Broken(right):  # type: ignore[misc,valid-type]
        plugins = (f"broken_families:{name}",)
        deny = ("llama", "bloom")

    expected = (BROKEN | BROKEN_BLOOM)[name]
    if name not in WRONG_ON_TWO_RANKS:  # where one rank is wrong already, two processes show nothing new
        Broken.tensor_parallel, expected = False, expected - {"test_tensor_parallel"}
    assert failures(Broken, tmp_path) == expected


def test_the_right_family_fails_nothing(tmp_path: Path) -> None:
    """So that what the broken ones fail is their own fault."""
    assert failures(TestLlama, tmp_path) == set()


def failures(kit: type[ModelFamilyConformance], directory: Path) -> set[str]:
    """The names of the kit's tests that fail, run as pytest would. Without peft one of them would be skipped."""
    pytest.importorskip("peft")
    installed = load_plugins(kit.plugins, kit.deny)
    given = {
        "installed": installed,
        "reference": ReferenceModel(kit.config, directory / "reference", installed, limits=kit.limits),
        "calm": ReferenceModel(kit.config, directory / "calm", installed, gain=0.8, limits=kit.limits),
        "tmp_path": directory,
    }
    failed = set()
    for name, test in inspect.getmembers(kit(), inspect.ismethod):
        if name.startswith("test_"):
            try:
                test(**{argument: given[argument] for argument in inspect.signature(test).parameters})
            except (AssertionError, TrtllmCoreError, pytest.fail.Exception):
                failed.add(name)
            except pytest.skip.Exception:
                pass
    return failed
