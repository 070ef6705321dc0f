"""Each check of the KV policies' kit can fail, and the built-in policies pass all of them."""

from __future__ import annotations

from typing import Any

import bad_policies as bad
import pytest

from trtllm_core.kv_cache import PagedPolicy
from trtllm_core.plugin import KVPolicyRegistrar, hookimpl
from trtllm_core.testing import KVPolicyConformance

EACH = [
    (bad.Telepathic, "test_declarations", "it needs ['thoughts']"),
    (bad.TakesAnyOption, "test_wrong_options_are_refused", "it takes the options {'no_such_option': 1}"),
    (bad.TooLarge, "test_the_plan_fits_the_budget", "it plans 124 tokens of room, the budget is 120"),
    (bad.Remembers, "test_planning_forgets_everything", "blocks are in use"),
    (bad.ForgetsCopies, "test_slots_read_back_their_text", "does not read back its tokens"),
    (bad.WritesShared, "test_an_entry_has_one_writer", "may both write an entry"),
    (bad.Leaks, "test_blocks_are_free_or_used", "are lost"),
    (bad.FreesTwice, "test_its_own_check_holds", "a block was given back more often than it was taken"),
    (bad.Leaks, "test_everything_is_given_back", "are lost"),
    (bad.EvictsNothing, "test_everything_is_given_back", "are left"),
    (bad.ForksOneByOne, "test_forks_are_simultaneous", "length() says"),
    (bad.CopiesOneByOne, "test_forks_are_simultaneous", "does not read back its tokens"),
    (bad.ForgetsCopies, "test_forks_are_independent", "does not read back its tokens"),
    (bad.MovesShared, "test_forks_are_independent", "does not read back its tokens"),
    (bad.DropsAndKeepsCount, "test_slots_read_back_their_text", "length() says"),
    (bad.ForgetsBranches, "test_branches_find_room", "out of blocks"),
    (bad.RewindsTooFar, "test_rewinds", "length() says"),
    (bad.StopsHalfWay, "test_what_fails_changes_nothing", "left something changed"),
    (bad.BreaksPromises, "test_who_is_admitted_does_not_run_out", "run out of room"),
    (bad.WaitsForEver, "test_nobody_waits_for_ever", "wait in an empty pool: raise CapacityError"),
    (bad.SharesAcrossKeys, "test_what_is_found_was_computed", "does not read back its tokens"),
    (bad.ClaimsRoom, "test_generation", "a token without a block"),
]
BUILT_IN: dict[str, tuple[dict[str, Any], ...]] = {
    "paged": ({}, {"watermark": 0.2}),
    "prefix": ({}, {"eviction": "lfu", "partial_blocks": False}, {"wait_for_prefix": False}, {"host_tokens": 30}),
    "contiguous": ({},),
}
WRONG = ({"watermark": 2},)


@pytest.mark.parametrize(("policy", "check", "why"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_can_fail(policy: Any, check: str, why: str, assert_found: Any) -> None:
    assert_found(KVPolicyConformance, policy, check, why)


def test_every_check_has_a_policy_that_fails_it() -> None:
    assert set(KVPolicyConformance.checks()) == {check for _, check, _ in EACH}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name: str, examine: Any) -> None:
    wrong = WRONG if name != "contiguous" else ()
    results = examine(KVPolicyConformance, name, params=BUILT_IN[name], wrong_params=wrong)
    skipped = {check for check, result in results.items() if result.status == "skipped"}
    assert [result for result in results.values() if result.status == "failed"] == []
    assert skipped == (set() if name == "prefix" else {"test_what_is_found_was_computed"})


def test_rings(examine: Any) -> None:
    params = ({"max_attention_window": 10, "sink_token_length": 3}, {"max_attention_window": 6})
    results = examine(KVPolicyConformance, "paged", params=params)
    assert [result for result in results.values() if result.status == "failed"] == []


@pytest.mark.parametrize("name", ["paged", "prefix"])
def test_optimistic_admission(name: str, examine: Any) -> None:
    """It promises nothing, and says so; taken at its word it would fail."""
    params = ({"admission": "optimistic"},)
    check = "test_who_is_admitted_does_not_run_out"
    assert examine(KVPolicyConformance, name, check, params=params)[check].status == "failed"
    results = examine(KVPolicyConformance, name, params=params, keeps_promises=False)
    failed = [result.check for result in results.values() if result.status == "failed"]
    assert failed in ([], ["test_generation"])


class Mine:
    """What an author has before it is installed."""

    hook_api = "kv_policy>=1.0,<2"

    @hookimpl
    def trtllm_register_kv_policies(self, registrar: KVPolicyRegistrar) -> None:
        registrar.add("mine", PagedPolicy)


def test_a_module_is_examined_too(examine: Any) -> None:
    result = examine(KVPolicyConformance, Mine(), "test_rewinds")
    assert result["test_rewinds"].status == "passed"
