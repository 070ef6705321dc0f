"""The core's own processors, criteria and samplers pass the kits that others are held against."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core.plugin import Plugins
from trtllm_core.plugin.versions import CORE
from trtllm_core.testing import (
    Conformance,
    DecoderConformance,
    LogitsProcessorConformance,
    StoppingCriterionConformance,
    run_kit,
)

SAMPLING: dict[str, tuple[dict[str, Any], ...]] = {
    "embedding_bias": ({"embedding_bias": {5: 1.0, 9: -2.0}},),
    "temperature": ({"temperature": 0.7}, {"temperature": 1.5}),
    "penalties": (
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4, "prompt_ignore_length": 2},
        {"frequency_penalty": -0.3},
    ),
    "min_length": ({"min_length": 6},),
    "no_repeat_ngram": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}),
    "bad_words": ({"bad_words_list": [[1, 2], [4], [3, 1, 0]]},),
    "top_k": ({"decoder": "multinomial", "top_k": 5}, {"decoder": "multinomial", "top_k": 2}),
    "top_p": ({"decoder": "multinomial", "top_p": 0.7}, {"decoder": "multinomial", "top_p": 0.2}),
    "typical_p": ({"typical_p": 0.7},),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.02},),
    "eta_cutoff": ({"eta_cutoff": 0.02},),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.6}),
    "stop_words": ({"stop_words_list": [[1, 2], [3, 3, 1], [8]]},),
    "stop_strings": ({"stop_strings": ("abc", "ca", "hh")},),
    "stop_regexes": ({"stop_regexes": ("a[bc]+d", "h{2}")},),
    "max_time": ({"max_time": 5.0},),
    "max_tokens": ({"max_new_tokens": 5}, {"max_new_tokens": 2}),
    "beam_search": ({"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.5}, {"num_beams": 4, "early_stopping": 0}),
    "hf_beam_search": ({"num_beams": 3}, {"num_beams": 2, "early_stopping": 0}),
    "hf_beam_sample": ({"num_beams": 2}, {"num_beams": 3}),
    "diverse_beam_search": ({"num_beams": 4},),
    "top_k_top_p": (
        {"top_k": 5, "top_p": 0.9},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.8, "top_p_decay": 0.9, "top_p_min": 0.3, "top_p_reset_ids": 3},
    ),
}
"""Fields with which a built-in does something, by its name."""
PARAMS: dict[str, tuple[dict[str, Any], ...]] = {
    "confidence": ({"above": 0.2}, {"measure": "entropy", "below": 1.5, "steps": 2}),
    "diverse_beam_search": ({"groups": 2, "penalty": 0.5},),
    "repetition": ({"count": 2}, {"min_size": 2, "max_size": 3, "count": 2}),
}
"""Its own parameters."""
PLAIN = {"end_id", "greedy", "multinomial", "ngram"}
"""What needs nothing."""
QUIET = {"max_time"}
"""What does nothing in a kit: its clock stands still."""
PLUGINS = Plugins.load(allow=[])
KITS = (
    (LogitsProcessorConformance, PLUGINS.logits_processors),
    (StoppingCriterionConformance, PLUGINS.stopping_criteria),
    (DecoderConformance, PLUGINS.decoders),
)
BUILT_IN = [(kit, entry.name) for kit, registry in KITS for entry in registry if entry.source.distribution == CORE]
each = pytest.mark.parametrize(("kit", "name"), BUILT_IN, ids=[name for _, name in BUILT_IN])


def examined(kit: type[Conformance], name: str) -> type[Conformance]:
    """The kit of one built-in."""
    return type(
        name, (kit,), {"plugin": name, "sampling": SAMPLING.get(name, ({},)), "params": PARAMS.get(name, ({},))}
    )


@pytest.mark.cuda
@each
def test_a_built_in_on_a_gpu(kit: type[Conformance], name: str) -> None:
    if name not in SAMPLING.keys() | PARAMS.keys() | PLAIN:
        pytest.skip("say in SAMPLING, PARAMS or PLAIN how to ask for it")
    results = run_kit(examined(kit, name), [check for check in kit.checks() if "gpu" in check])
    assert [result for result in results if result.status == "failed"] == []


@each
def test_a_built_in_conforms(kit: type[Conformance], name: str) -> None:
    if name not in SAMPLING.keys() | PARAMS.keys() | PLAIN:
        pytest.skip("say in SAMPLING, PARAMS or PLAIN how to ask for it")
    results = run_kit(examined(kit, name))
    assert [result for result in results if result.status == "failed"] == []
    acts = [result for result in results if result.check in ("test_it_does_something", "test_it_stops")]
    if name not in QUIET:
        assert [result for result in acts if result.status == "skipped"] == [], "give it what it acts with"
