"""XTC through the kit, and against the sort that it was written as first."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trtllm_contrib_xtc import plugin
from trtllm_contrib_xtc.processor import SALT
from trtllm_core.device import uniform
from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.lives import Branch
from trtllm_core.testing.vocabulary import byte_tokenizer


class TestXtc(LogitsProcessorConformance):
    plugin = plugin
    params = ({"threshold": 0.05, "probability": 0.7}, {"threshold": 0.02, "probability": 1.0, "protected": (3, 4)})
    wrong_params = ({"threshold": 0}, {"probability": 1.5}, {"protected": (40,)}, {"protected": (-1,)})


def reference(scores: torch.Tensor, threshold: float, protected: list[int]) -> torch.Tensor:
    """One row that XTC acts on, as in the pull request. A stable sort, so that of equals the last one stays."""
    values, indices = scores.sort(descending=True, stable=True)
    chances = values.softmax(dim=-1)
    remove = torch.full_like(chances, False, dtype=torch.bool)
    remove[:-1] = chances[1:] >= threshold
    removed = torch.zeros_like(remove).scatter(0, indices, remove)
    if removed[protected].any():
        return scores
    return scores.masked_fill(removed, -math.inf)


def test_it_is_the_reference() -> None:
    kit = TestXtc()
    rig = kit.rig(kit.setting())
    acted = spared = 0
    for seed in range(60):
        threshold, protected = (0.02, 0.05, 0.1)[seed % 3], (seed % 40, 5)
        params = {"threshold": threshold, "probability": 0.5, "protected": protected}
        case = kit.subject().case(params, {}, ())
        rig.begin(0, Branch(case, (1, 2, 3), seed=seed))
        logits = torch.randn(1, rig.rows.shape[1], generator=torch.Generator().manual_seed(seed)) * 2
        if seed % 4 == 0:
            logits = logits.round()  # equals
        logits[:, 40:] = torch.finfo(torch.float32).min
        (found,) = rig.processed([0], logits)
        u = uniform(rig.floor.context.seeds[:1], torch.tensor([3]), SALT)
        due = reference(logits[0], threshold, [*protected, 9]) if u <= 0.5 else logits[0]
        assert torch.equal(found, due)
        acted += not torch.equal(found, logits[0])
        spared += bool(u <= 0.5) and torch.equal(due, logits[0])
        rig.end(0)
    assert acted > 5
    assert spared > 5


def test_it_acts_as_often_as_it_is_asked_to() -> None:
    kit = TestXtc()
    rig = kit.rig(replace(kit.setting(), max_seq_len=4000))
    case = kit.subject().case({"threshold": 0.05, "probability": 0.3}, {}, ())
    rig.begin(0, Branch(case, (1,)))
    logits = torch.zeros(1, rig.rows.shape[1])
    logits[:, [1, 2]] = 4.0
    acted = 0
    for _ in range(2000):
        acted += int(rig.processed([0], logits)[0, 1] == -math.inf)
        rig.commit({0: [2]})
    assert abs(acted / 2000 - 0.3) < 0.05


def test_the_newline_is_protected() -> None:
    kit = TestXtc()
    rig = kit.rig(replace(kit.setting(), vocab_size=300, tokenizer=byte_tokenizer()))
    rig.begin(0, Branch(kit.subject().case({"threshold": 0.05, "probability": 1.0}, {}, ()), (1,)))
    logits = torch.zeros(1, rig.rows.shape[1])
    logits[:, [ord("\n"), 100]] = torch.tensor([9.0, 8.0])
    assert torch.equal(rig.processed([0], logits), logits)
    logits[:, [ord("\n"), 100]] = torch.tensor([8.0, 9.0])
    assert rig.processed([0], logits)[0, 100] == -math.inf
