"""DRY through the kit, and against the loops that it was written as first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from trtllm_contrib_dry import plugin
from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.letters import letter_tokenizer, pieces
from trtllm_core.testing.lives import Branch
from trtllm_core.testing.markov import MarkovExecutable

VOCAB = 40


class TestDry(LogitsProcessorConformance):
    plugin = plugin
    params = (
        {"breakers": ("h",)},
        {"multiplier": 2.0, "base": 1.2, "allowed_length": 1, "breakers": ()},
        {"allowed_length": 3, "range": 9, "breakers": ("dd",)},
    )
    wrong_params = ({"base": 0.5}, {"multiplier": -1}, {"breakers": ("",)}, {"allowed_length": 0})


def reference(
    scores: torch.Tensor,
    text: Sequence[int],
    breakers: set[int],
    multiplier: float,
    base: float,
    allowed: int,
    window: int,
) -> torch.Tensor:
    """One row, token by token, as in the pull request."""
    ids = list(text)[-window:] if window else list(text)
    scores = scores.clone()
    last = ids[-1]
    if last in breakers:
        return scores
    lengths: dict[int, int] = {}
    for i in [i for i in range(len(ids) - 1) if ids[i] == last]:
        following = ids[i + 1]
        if following in breakers:
            continue
        length = 1
        while True:
            j = i - length
            if j < 0:
                break
            previous = ids[-(length + 1)]
            if ids[j] != previous or previous in breakers:
                break
            length += 1
        lengths[following] = max(length, lengths.get(following, 0))
    for token, length in lengths.items():
        if length >= allowed:
            scores[token] -= multiplier * base ** (length - allowed)
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    kit = TestDry()
    params = {
        "multiplier": draw.choice([0.5, 1.0]),
        "base": draw.choice([1.0, 1.75]),
        "allowed_length": draw.randint(1, 4),
        "range": draw.choice([0, 6, 15]),
        "breakers": draw.choice([(), ("a",), ("bc", "h")]),
    }
    rig = kit.rig(kit.setting())
    case = kit.subject().case(params, {}, ())
    breakers = {i for i, piece in enumerate(pieces(VOCAB)) if any(mark in piece for mark in params["breakers"])}
    for slot in range(6):
        pattern = [draw.randrange(12) for _ in range(draw.randint(2, 5))]
        text = (pattern * 6 + [draw.randrange(12)] + pattern * 3)[: draw.randint(4, 40)]
        rig.begin(slot, Branch(case, tuple(text)))
        due = reference(
            rig.rows[slot],
            text,
            breakers,
            params["multiplier"],
            params["base"],
            params["allowed_length"],
            params["range"],
        )
        assert torch.allclose(rig.answers([slot])[slot], due, rtol=1e-5)


def test_it_breaks_a_circle() -> None:
    table = torch.zeros(VOCAB, VOCAB)
    for token in range(VOCAB):
        table[token, (token + 1) % 4] = 6.0  # 0 1 2 3 0 1 2 3 …, and everything else as likely as the rest
    engine = MarkovExecutable(VOCAB, table=table)
    runner = ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[plugin]), tokenizer=letter_tokenizer(VOCAB))
    free = SamplingConfig(max_new_tokens=40, end_id=())
    dry = free.replace(logits_processors=use("dry", multiplier=1.0, breakers=()))
    circle, text = runner.generate([[0], [0]], [free, dry])[:, 0].tolist()
    assert circle == [i % 4 for i in range(41)]
    runs = [text[i : i + 8] for i in range(len(text) - 8)]
    assert len({tuple(run) for run in runs}) > 0.8 * len(runs)
