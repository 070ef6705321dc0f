"""Each check of the decoders' kit can fail for a sampler, and what is sound passes all of them."""

from __future__ import annotations

from typing import Any

import bad_samplers as bad
import breaks
import pytest

from trtllm_core.testing import DecoderConformance
from trtllm_core.testing.searches import SearchChecks

WRONG = ({"rate": -1.0},)
EACH = [
    (bad.WrongShape, "test_asking_moves_no_state", "not one token for each of 6 rows"),
    (bad.TorchRandom, "test_asking_moves_no_state", "asked a second time, it answers differently"),
    (bad.ByRow, "test_rows_are_independent", "in another order of rows"),
    (bad.CommitsOthers, "test_commits_of_part_of_the_batch", "after commits of some slots at a time"),
    (bad.SharedState, "test_forks_are_independent", "after a copy went its own way"),
    (bad.FirstTokenOnly, "test_several_tokens_at_once", "after commits of several tokens"),
    (bad.Waits, "test_the_host_never_waits", "waits for the device"),
    (bad.ForgetsTheEnd, "test_generation", "it was over"),
    (bad.NoCapabilities, "test_declarations", "no DecoderCapabilities"),
    (bad.Everything, "test_tokens_can_be_chosen", "which is forbidden"),
    (bad.OutOfTheVocabulary, "test_tokens_can_be_chosen", "outside the vocabulary"),
    (bad.NotGreedy, "test_greedy_takes_the_largest", "it declares greedy"),
    (bad.OthersShift, "test_beside_rows_of_other_decoders", "beside rows of other decoders"),
    (bad.BlindToOffsets, "test_draws_belong_to_positions", "behind 1 drafts it takes the tokens"),
    *breaks.shared(bad.Cooling, WRONG[0]),
    (
        breaks.broken(breaks.NoRewind, bad.Cooling),
        "test_everything_together",
        "after commits, forks, rewinds and restarts",
    ),
    breaks.joins("decoders", bad.Cooling, consumes=("top_k", "top_p", "random_seed"), replace="top_k_top_p"),
    (bad.BySlot, "test_draws_belong_to_requests", "in other slots, the same branches get the tokens"),
]


@pytest.mark.parametrize(("plugin", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(plugin: Any, check: str, why: str, assert_found: Any) -> None:
    params = {"wrong_params": WRONG} if "parameters" in check else {}
    assert_found(DecoderConformance, plugin, check, why, **params)


def test_every_check_has_a_sampler_that_fails_it() -> None:
    searches = {name for name in vars(SearchChecks) if name.startswith("test_")}
    every = {check for check in DecoderConformance.checks() if "gpu" not in check} - searches
    assert every == {check for _, check, _ in EACH}


def test_what_is_sound_passes(examine: Any) -> None:
    results = examine(DecoderConformance, bad.Cooling, params=({}, {"rate": 2.0}), wrong_params=WRONG)
    assert [result for result in results.values() if result.status == "failed"] == []
