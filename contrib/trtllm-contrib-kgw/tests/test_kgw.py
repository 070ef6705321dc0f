"""The watermark through the kit, against a plain reference, and through its detector."""

from __future__ import annotations

import random

import pytest
import torch

from trtllm_contrib_kgw import plugin
from trtllm_contrib_kgw.detector import detect
from trtllm_contrib_kgw.green import MAX_CONTEXT, SALT, draws_of, keys_of
from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.markov import MarkovExecutable

WORD = (1 << 64) - 1


class TestWatermark(LogitsProcessorConformance):
    plugin = plugin
    params = ({}, {"gamma": 0.5, "delta": 4.0, "context": 3, "key": 7})
    wrong_params = ({"gamma": 1.0}, {"delta": -1}, {"context": 5}, {"key": -1})


def mixed(word: int) -> int:
    """SplitMix64's finaliser."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def plain_draw(key: int, context: list[int], token: int, salt: int) -> float:
    """The number of one token after one context, in plain integers."""
    for before in reversed(context):
        key = ((key ^ (before + 1)) * 0x100000001B3) & WORD
    word = mixed((key + salt + token * 0x9E3779B97F4A7C15) & WORD)
    return ((word >> 40) + 1) / 2**24


def test_lists_are_those_of_a_plain_reference() -> None:
    draw = random.Random(0)
    for _ in range(50):
        width, secret = draw.randint(1, MAX_CONTEXT), draw.getrandbits(62)
        context = [draw.randrange(1000) for _ in range(width)]
        row = torch.tensor([context[::-1] + [-1] * (MAX_CONTEXT - width)])
        keys = keys_of(torch.tensor([secret]), row, torch.tensor([width]))
        draws = draws_of(keys.unsqueeze(1), torch.arange(64))[0]
        due = [plain_draw(secret, context, token, SALT & WORD) for token in range(64)]
        assert draws.tolist() == due
        assert draws_of(keys, torch.tensor([40])).item() == due[40]


def test_a_share_of_gamma_is_green_in_every_context() -> None:
    context = torch.arange(400).view(100, MAX_CONTEXT)
    keys = keys_of(torch.full((100,), 5), context, torch.full((100,), 2))
    green = draws_of(keys.unsqueeze(1), torch.arange(4000)) <= 0.25
    assert green.float().mean().item() == pytest.approx(0.25, abs=0.003)
    assert (green[0] & green[1]).float().mean().item() == pytest.approx(0.0625, abs=0.015)  # lists are independent


@pytest.fixture(scope="module")
def texts() -> dict[float, list[list[int]]]:
    """Texts by delta: a flat model of 499 tokens, 100 tokens each."""
    engine = MarkovExecutable(499)
    runner = ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[plugin]))
    base = SamplingConfig(top_k=0, top_p=1.0, max_new_tokens=100, end_id=(), return_dict=True)
    found = {}
    for delta in (0.0, 4.0):
        requests = [
            base.replace(random_seed=seed, logits_processors=use("kgw", delta=delta, key=99)) for seed in range(8)
        ]
        outputs = runner.generate([[seed] for seed in range(8)], requests)["outputs"]
        found[delta] = [list(output.tokens) for output in outputs]
    return found


def test_marked_texts_are_detected(texts: dict[float, list[list[int]]]) -> None:
    for tokens in texts[4.0]:
        found = detect(tokens, key=99)
        assert found.z > 4
        assert found.p_value < 1e-4
        assert abs(detect(tokens, key=98).z) < 4, "with another key it is no watermark"


def test_texts_without_a_watermark_are_not(texts: dict[float, list[list[int]]]) -> None:
    z = [detect(tokens, key=99).z for tokens in texts[0.0]]
    assert max(map(abs, z)) < 4
    assert abs(sum(z)) / len(z) ** 0.5 < 3


def test_z_is_the_formula() -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    found = detect(tokens, key=1, gamma=0.5, unique=False)
    assert found.total == len(tokens) - 1
    assert found.z == pytest.approx((found.green - 0.5 * found.total) / (found.total * 0.25) ** 0.5)


def test_repetitions_count_once() -> None:
    assert detect([1, 2] * 50, unique=True).total == 2
    assert detect([1, 2] * 50, unique=False).total == 99
    assert detect([1]).total == 0
