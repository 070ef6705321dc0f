"""Each check of the processors' kit can fail, and what is sound passes all of them."""

from __future__ import annotations

from typing import Any

import bad_host_processors as bad_host
import bad_processors as bad
import breaks
import pytest

from trtllm_core.testing import LogitsProcessorConformance

WRONG = ({"weight": -1.0},)
EACH = [
    (bad.Shape, "test_asking_moves_no_state", "apply returned logits of shape"),
    (bad.Nan, "test_logits_stay_usable", "it leaves NaN"),
    (bad.Everything, "test_logits_stay_usable", "it leaves no token"),
    (bad.Padding, "test_logits_stay_usable", "it raises a token of the padding"),
    (bad.Others, "test_rows_of_others_are_untouched", "it changes rows of requests that did not ask for it"),
    (bad.MovesInApply, "test_asking_moves_no_state", "asked a second time, it answers differently: token "),
    (bad.ByRow, "test_rows_are_independent", "in another order of rows"),
    (bad.Neighbours, "test_rows_are_independent", "in a smaller batch"),
    (bad.CommitsOthers, "test_commits_of_part_of_the_batch", "after commits of some slots at a time"),
    (bad.NoFork, "test_forks_are_simultaneous", "after a fork"),
    (bad_host.SharesForks, "test_forks_are_independent", "after a copy went its own way"),
    (bad.OneTokenACommit, "test_several_tokens_at_once", "after commits of several tokens"),
    (bad.BlindToDrafts, "test_drafts_are_seen", "behind 1 drafts"),
    (bad.NotInvariant, "test_argmax_is_invariant", "changes which token is the likeliest"),
    (bad.NotInvariant, "test_greedy_requests_without_it", "a greedy request gets other tokens without it"),
    (bad.Waits, "test_the_host_never_waits", "waits for the device"),
    (bad.WaitsForAList, "test_the_host_never_waits", "Tensor.tolist waits for the device"),
    (bad.MaskAsIndex, "test_the_host_never_waits", "a mask as an index"),
    (bad.KeyIsAList, "test_graph_key", "not hashable"),
    (bad.RaisesItsOwn, "test_wrong_parameters_are_refused", "RuntimeError: weight"),
    (bad.NoPhase, "test_declarations", "its phase is 'penalty!'"),
    (bad.OrderIsText, "test_declarations", "its after is 'penalties'"),
    (bad.EmptyCompanion, "test_companions", "it asks for the companion ()"),
    (bad.OtherCompanions, "test_companions", "asked again, it wants other companions"),
    (bad_host.BlindToCompanions, "test_companions", "write process_beside"),
    (bad_host.HostTakesNothingBack, "test_declarations", "write take_back"),
    (bad_host.HostTakesTooMuchBack, "test_rewinds", "after a rewind"),
    (bad_host.HostMovesInMask, "test_asking_moves_no_state", "asked a second time"),
    (bad_host.MaskOfTheStepBefore, "test_masks_prepared_beside_the_forward_pass", "with masks prepared before"),
    (bad.ForgetsTheEnd, "test_generation", "a slot that is not mine"),
    *breaks.shared(bad.Counting, WRONG[0]),
    (
        breaks.broken(breaks.NoRewind, bad.Counting),
        "test_everything_together",
        "after commits, forks, rewinds and restarts",
    ),
    breaks.joins("logits_processors", bad.Counting, consumes={"temperature": 0.5}),
]


@pytest.mark.parametrize(("plugin", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(plugin: Any, check: str, why: str, assert_found: Any) -> None:
    params = {"wrong_params": WRONG} if "parameters" in check else {}
    assert_found(LogitsProcessorConformance, plugin, check, why, **params)


ON_A_GPU = [
    (bad.OtherOnAGpu, "test_gpu_equals_cpu", "on a GPU it answers differently"),
    (bad.Waits, "test_gpu_never_waits", "synchroniz"),
    (bad.MaskAsIndex, "test_gpu_never_waits", "synchroniz"),
    (bad.FrozenInAGraph, "test_gpu_graphs", "replayed from a CUDA graph, it answers differently after 1 steps"),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("plugin", "check", "why"), ON_A_GPU, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_on_a_gpu_can_fail(plugin: Any, check: str, why: str, assert_found: Any) -> None:
    assert_found(LogitsProcessorConformance, plugin, check, why)


@pytest.mark.cuda
def test_what_is_sound_passes_on_a_gpu(examine: Any) -> None:
    for _, check, _ in ON_A_GPU:
        assert examine(LogitsProcessorConformance, bad.Counting, check)[check].status == "passed"


def test_every_check_has_a_plugin_that_fails_it() -> None:
    every = set(LogitsProcessorConformance.checks()) - {"test_it_does_something"}
    assert every == {check for _, check, _ in [*EACH, *ON_A_GPU]}


@pytest.mark.parametrize(
    "plugin", [bad.Counting, bad.Refuses, bad_host.Alternating], ids=lambda plugin: plugin.__name__
)
def test_what_is_sound_passes(plugin: Any, examine: Any) -> None:
    attributes = {"params": ({}, {"weight": 2.0}), "wrong_params": WRONG} if plugin is not bad_host.Alternating else {}
    results = examine(LogitsProcessorConformance, plugin, **attributes)
    assert [result for result in results.values() if result.status == "failed"] == []
    assert results["test_it_does_something"].status == "passed"


def test_what_cannot_be_asked_for_is_not_examined(examine: Any) -> None:
    results = examine(LogitsProcessorConformance, breaks.needy(bad.Counting))
    assert [name for name, result in results.items() if result.status == "failed"] == ["test_it_can_be_asked_for"]
    assert "weight" in results["test_rewinds"].why


def test_a_plugin_that_never_acts_is_told_so(examine: Any) -> None:
    result = examine(LogitsProcessorConformance, bad.Idle)["test_it_does_something"]
    assert result.status == "skipped"
    assert "no logit changed" in result.why
