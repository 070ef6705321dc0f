"""Each check of the decoders' kit can fail for a search, and what is sound passes all of them."""

from __future__ import annotations

from typing import Any

import bad_decoders as bad
import pytest

from trtllm_core.testing import DecoderConformance
from trtllm_core.testing.searches import SearchChecks

SAMPLING = ({"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2, "length_penalty": 0.5})
EACH = [
    (bad.PlansAtRandom, "test_plan", "and another time"),
    (bad.PlansNothing, "test_it_can_be_asked_for", "from plan"),
    (bad.MovesInSelect, "test_choosing_moves_no_state", "select answers with other scores"),
    (bad.MovesInSurvive, "test_choosing_moves_no_state", "asked a second time, survive says"),
    (bad.Forbidden, "test_candidates_can_be_chosen", "it takes token 2, which is forbidden"),
    (bad.Padding, "test_candidates_can_be_chosen", "outside the vocabulary of 40"),
    (bad.WorstFirst, "test_sequences", "do not come best first"),
    (bad.TooFew, "test_sequences", "its plan returns 3 sequences, and the user gets 1"),
    (bad.ByBatch, "test_generation", "in a batch, a request gets"),
    (bad.ByBatch, "test_beside_penalties_and_stops", "with penalties and stops, a request gets"),
    (bad.LeavesStateBehind, "test_generation", "a second time in one session"),
]


@pytest.mark.parametrize(("search", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(search: Any, check: str, why: str, assert_found: Any) -> None:
    assert_found(DecoderConformance, bad.register(search), check, why, sampling=SAMPLING)


def test_every_check_of_searches_has_a_plugin_that_fails_it() -> None:
    every = {name for name in vars(SearchChecks) if name.startswith("test_")}
    assert every <= {check for _, check, _ in EACH}


@pytest.mark.parametrize("search", [bad.Sound, bad.Picky], ids=lambda search: search.__name__)
def test_what_is_sound_passes(search: Any, examine: Any) -> None:
    results = examine(DecoderConformance, bad.register(search), sampling=SAMPLING)
    assert [result for result in results.values() if result.status == "failed"] == []
    assert results["test_sequences"].status == "passed"
    assert results["test_forks_are_simultaneous"].status == "skipped"
