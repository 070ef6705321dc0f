"""Each check of the criteria's kit can fail, and what is sound passes all of them."""

from __future__ import annotations

from typing import Any

import bad_criteria as bad
import breaks
import pytest

from trtllm_core.testing import StoppingCriterionConformance

WRONG = ({"most": 0},)
EACH = [
    (bad.WrongShape, "test_asking_moves_no_state", "check returned tensor"),
    (bad.TooFar, "test_asking_moves_no_state", "it stops at token 8 of 1 new ones"),
    (bad.NoStop, "test_asking_moves_no_state", "check returned a bool, no Stop"),
    (bad.NoReason, "test_declarations", "say in a word why a row ends"),
    (bad.NoScope, "test_declarations", "its scope is 'batch'"),
    (bad.TakesNothingBack, "test_declarations", "write take_back"),
    (bad.MovesInCheck, "test_asking_moves_no_state", "asked a second time, it answers differently: of new tokens"),
    (bad.ByRow, "test_rows_are_independent", "in a smaller batch"),
    (bad.CommitsOthers, "test_commits_of_part_of_the_batch", "after commits of some slots at a time"),
    (bad.SharesForks, "test_forks_are_independent", "after a copy went its own way"),
    (bad.CountsBeyond, "test_everything_together", "after commits, forks, rewinds and restarts"),
    (bad.CountsBeyond, "test_several_tokens_at_once", "after commits of several tokens"),
    (bad.FirstTokenOnly, "test_where_it_stops_does_not_depend_on_the_steps", "of tokens that come at once it says"),
    (bad.SeesOthers, "test_rows_of_others", "beside rows that did not ask for it"),
    (bad.Waits, "test_the_host_never_waits", "waits for the device"),
    (bad.HoldsTooMuch, "test_text_that_is_held_back", "pending_text holds 1000 bytes back"),
    (bad.ForgetsTheEnd, "test_generation", "it was over"),
    *breaks.shared(bad.Quota, WRONG[0]),
    breaks.joins("stopping_criteria", bad.Quota, consumes={"max_new_tokens": None}),
]


@pytest.mark.parametrize(("plugin", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(plugin: Any, check: str, why: str, assert_found: Any) -> None:
    params = {"wrong_params": WRONG} if "parameters" in check else {}
    assert_found(StoppingCriterionConformance, plugin, check, why, **params)


def test_every_check_has_a_plugin_that_fails_it() -> None:
    every = {check for check in StoppingCriterionConformance.checks() if "gpu" not in check} - {"test_it_stops"}
    assert every == {check for _, check, _ in EACH}


@pytest.mark.parametrize("plugin", [bad.Quota, bad.Confident, bad.Twice], ids=lambda plugin: plugin.__name__)
def test_what_is_sound_passes(plugin: Any, examine: Any) -> None:
    attributes = {"params": ({}, {"most": 2}), "wrong_params": WRONG} if plugin is bad.Quota else {}
    results = examine(StoppingCriterionConformance, plugin, **attributes)
    assert [result for result in results.values() if result.status == "failed"] == []
    assert results["test_it_stops"].status == "passed"


def test_a_criterion_that_never_stops_is_told_so(examine: Any) -> None:
    result = examine(StoppingCriterionConformance, bad.Never, "test_it_stops")["test_it_stops"]
    assert result.status == "skipped"
    assert "no text that was tried ended" in result.why
