"""What configs of the family may say, each against transformers: prefill and decoding over a ragged batch."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core import nn
from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_bloom import family

CASES: dict[str, dict[str, Any]] = {
    "four heads": {},
    "one head": {"n_head": 1},
    "three heads": {"n_head": 3, "hidden_size": 96},
    "fourteen heads": {"n_head": 14, "hidden_size": 28 * 4},
    "heads of 128": {"n_head": 2, "hidden_size": 256},
    "normalised residual": {"apply_residual_connection_post_layernorm": True},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, tiny: Any) -> None:
    model = tiny(**CASES[case])
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS, shuffle=3)) < 1e-4


@pytest.mark.parametrize("extras", [{"normalised_residual": True}, {"norm_eps": 1e-2}])
def test_a_planted_bug_shows(extras: dict[str, Any], tiny: Any) -> None:
    model = tiny()
    assert model.off(prefill_and_decode(model.mutant(extras), model.prompts, STEPS)) > 1e-3


WRONG: dict[str, Any] = {
    "of twice the heads": lambda self, device: setattr(self, "slopes", nn.alibi_slopes(8)[:4]),
    "halved": lambda self, device: setattr(self, "slopes", tuple(x / 2 for x in self.slopes)),
    "reversed": lambda self, device: setattr(self, "slopes", self.slopes[::-1]),
    "none": lambda self, device: setattr(self, "slopes", (0.0,) * len(self.slopes)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_slopes_show(wrong: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = nn.Alibi.prepare

    def other(self: nn.Alibi, device: Any) -> None:
        WRONG[wrong](self, device)
        prepare(self, device)

    monkeypatch.setattr(nn.Alibi, "prepare", other)
    model = tiny()
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS)) > 1e-2


def test_a_wrong_order_of_rows_shows(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads taken for thirds."""
    monkeypatch.setattr(family, "of_each_head", lambda part, parts, size: lambda tensor: tensor.chunk(parts)[part])
    model = tiny(vocab_size=71)  # built here, not before
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS)) > 1e-2
