"""How a step's budget is shared where branches have companions, and how companions leave its rows again."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.decoding.companion_prompts import CompanionPrompts
from trtllm_core.decoding.companions import Companions

SLOTS = 12


def placed(sizes: list[int]) -> tuple[Companions, list[int]]:
    """Branches with so many companions each, in the order of their slots: a branch, its companions, the next one."""
    companions, branches, at = Companions(SLOTS, torch.device("cpu")), [], 0
    for size in sizes:
        asked = (CompanionPrompts("p", "p", ((1,),) * size),) if size else ()
        companions.begin((at,), tuple(range(at + 1, at + 1 + size)), asked)
        branches.append(at)
        at += 1 + size
    return companions, branches


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.data())
def test_texts_end_together_and_everybody_gets_on(sizes, data):
    companions, branches = placed(sizes)
    used = sum(sizes) + len(sizes)
    wanted = np.zeros(SLOTS, np.int64)
    wanted[:used] = data.draw(st.lists(st.integers(1, 20), min_size=used, max_size=used))
    budget = data.draw(st.integers(SLOTS, 20))
    for _ in range(200):
        slots, counts = companions.share(branches, wanted, budget)
        assert 0 < sum(counts) <= budget
        assert len(set(slots)) == len(slots)
        wanted[slots] -= counts
        assert (wanted >= 0).all()
        for branch in list(branches):
            left = wanted[[branch, *companions.of.get(branch, ())]]
            assert (left == 0).all() or (left > 0).all()
            if not left.any():
                branches.remove(branch)
        if not branches:
            return
    raise AssertionError("somebody never gets on")


def test_rows_are_parted_between_drafts_of_others():
    companions, _ = placed([1, 0, 2])  # slots 0 (1), 2, 3 (4, 5)
    logits = torch.arange(8.0).unsqueeze(1)
    drafts = np.array([0, 0, 2, 0, 0, 0])
    slots, own, left, beside = companions.parted([5, 3, 2, 0, 1, 4], logits, drafts)
    assert (slots, left.tolist()) == ([3, 2, 0], [0, 2, 0])
    assert own.flatten().tolist() == [1, 2, 3, 4, 5]
    assert beside.logits.flatten().tolist() == [0, 6, 7]
    shown = companions.shown([3, 2, 2, 2, 0], beside)
    assert shown.tables["p"].tolist() == [[2, 0], [-1, -1], [-1, -1], [-1, -1], [1, -1]]


def test_forks_take_companions_along():
    companions, _ = placed([2, 2])  # slots 0 (1, 2), 3 (4, 5)
    assert companions.with_pairs([0, 3], [3, 0]) == ([0, 3, 1, 2, 4, 5], [3, 0, 4, 5, 1, 2])
    for slot in range(SLOTS):
        companions.end(slot)
    assert not companions
    assert not companions.here.any()
