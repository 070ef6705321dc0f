"""The core's own processors, criteria and decoders pass the kits for others, tried by their own examples."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core.config import BuildConfig
from trtllm_core.plugin import Plugins
from trtllm_core.plugin.versions import CORE
from trtllm_core.session import Session
from trtllm_core.testing import (
    Conformance,
    DecoderConformance,
    LogitsProcessorConformance,
    StoppingCriterionConformance,
    run_kit,
)
from trtllm_core.testing.markov import MarkovExecutable

PLUGINS = Plugins.load(allow=[])
KITS = (
    (LogitsProcessorConformance, PLUGINS.logits_processors),
    (StoppingCriterionConformance, PLUGINS.stopping_criteria),
    (DecoderConformance, PLUGINS.decoders),
)
BUILT_IN = [(kit, entry.name) for kit, registry in KITS for entry in registry if entry.source.distribution == CORE]
each = pytest.mark.parametrize(("kit", "name"), BUILT_IN, ids=[name for _, name in BUILT_IN])


def given(name: str) -> dict[str, Any]:
    """Parameters that no example can hold."""
    if name != "draft_model":
        return {}
    build = BuildConfig(max_batch_size=16, max_input_len=95, max_seq_len=96, tokens_per_block=8)
    engine = MarkovExecutable(DecoderConformance.vocab_size, seed=1, build=build)
    return {"params": ({"session": Session.from_engine(engine), "tokens": 3},)}


def examined(kit: type[Conformance], name: str) -> type[Conformance]:
    """The kit of one built-in."""
    return type(name, (kit,), {"plugin": name, **given(name)})


@pytest.mark.cuda
@each
def test_a_built_in_on_a_gpu(kit: type[Conformance], name: str) -> None:
    results = run_kit(examined(kit, name), [check for check in kit.checks() if "gpu" in check])
    assert [result for result in results if result.status == "failed"] == []


@each
def test_a_built_in_conforms(kit: type[Conformance], name: str) -> None:
    results = {result.check: result for result in run_kit(examined(kit, name))}
    assert [result for result in results.values() if result.status == "failed"] == []
    assert results["test_it_can_be_asked_for"].status == "passed"
    for check in ("test_it_does_something", "test_it_stops", "test_generation"):
        assert check not in results or results[check].status == "passed", results[check].why


def test_an_engine_is_no_example() -> None:
    """What must be given an object is passed over where nobody gives one, and says why."""
    results = run_kit(type("Kit", (DecoderConformance,), {"plugin": "draft_model"}))
    assert [result for result in results if result.status == "failed"] == []
    asked = next(result for result in results if result.check == "test_it_can_be_asked_for")
    assert asked.status == "skipped"
    assert "its parameters are no JSON, give them by `params`" in asked.why
    assert "'session' is required" in asked.why


def test_none_is_missed() -> None:
    """Whatever the core registers for requests is examined here."""
    registries = (PLUGINS.logits_processors, PLUGINS.stopping_criteria, PLUGINS.decoders)
    assert [name for _, name in BUILT_IN] == [entry.name for registry in registries for entry in registry]
    assert len(BUILT_IN) >= 30
