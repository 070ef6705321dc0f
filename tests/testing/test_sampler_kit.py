"""Each check of the decoders' kit can fail for a sampler, and what is sound passes all of them."""

from __future__ import annotations

from typing import Any

import bad_samplers as bad
import pytest

from trtllm_core.testing import DecoderConformance
from trtllm_core.testing.searches import SearchChecks

WRONG = ({"rate": -1.0},)
EACH = [
    (bad.WrongShape, "test_asking_moves_no_state", "not one token for each of 6 rows"),
    (bad.TorchRandom, "test_asking_moves_no_state", "asked a second time, it answers differently"),
    (bad.ByRow, "test_rows_are_independent", "in another order of rows"),
    (bad.CommitsOthers, "test_commits_of_part_of_the_batch", "after commits of some slots at a time"),
    (bad.Leftovers, "test_slots_are_used_again", "in a slot that was used before"),
    (bad.ForksOneByOne, "test_forks_are_simultaneous", "after a fork"),
    (bad.SharedState, "test_forks_are_independent", "after a copy went its own way"),
    (bad.FirstTokenOnly, "test_several_tokens_at_once", "after commits of several tokens"),
    (bad.NoRewind, "test_rewinds", "after a rewind"),
    (bad.NoRewind, "test_everything_together", "after commits, forks, rewinds and restarts"),
    (bad.Waits, "test_the_host_never_waits", "waits for the device"),
    (bad.Branches, "test_shapes_are_fixed", "two steps ran different operations"),
    (bad.NewKey, "test_graph_key", "its graph_key changed"),
    (bad.TakesAnything, "test_wrong_parameters_are_refused", "it takes the parameters {'rate': -1.0}"),
    (bad.Joins(), "test_who_does_not_ask_pays_nothing", "it joins requests that did not ask for it"),
    (bad.NeedsParams, "test_it_can_be_asked_for", "give other `params` or `sampling`"),
    (bad.ForgetsTheEnd, "test_generation", "it was over"),
    (bad.NoCapabilities, "test_declarations", "no DecoderCapabilities"),
    (bad.Everything, "test_tokens_can_be_chosen", "which is forbidden"),
    (bad.OutOfTheVocabulary, "test_tokens_can_be_chosen", "outside the vocabulary"),
    (bad.NotGreedy, "test_greedy_takes_the_largest", "it declares greedy"),
    (bad.OthersShift, "test_beside_rows_of_other_decoders", "beside rows of other decoders"),
    (bad.BlindToOffsets, "test_draws_belong_to_positions", "behind 1 drafts it takes the tokens"),
    (bad.BySlot, "test_draws_belong_to_requests", "in other slots, the same branches get the tokens"),
]


@pytest.mark.parametrize(("plugin", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(plugin: Any, check: str, why: str, examine: Any) -> None:
    params = {"wrong_params": WRONG} if "parameters" in check else {}
    result = examine(DecoderConformance, plugin, check, **params)[check]
    assert result.status == "failed"
    assert why in result.why


def test_every_check_has_a_sampler_that_fails_it() -> None:
    searches = {name for name in vars(SearchChecks) if name.startswith("test_")}
    every = {check for check in DecoderConformance.checks() if "gpu" not in check} - searches
    assert every == {check for _, check, _ in EACH}


def test_what_is_sound_passes(examine: Any) -> None:
    results = examine(DecoderConformance, bad.Cooling, params=({}, {"rate": 2.0}), wrong_params=WRONG)
    assert [result for result in results.values() if result.status == "failed"] == []
