"""What policies may do after a step, and what becomes of those that say what is not so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trtllm_core import KVCacheConfig, ModelRunner, Plugins
from trtllm_core.errors import ConfigError, PluginContractError
from trtllm_core.kv_cache import ContiguousPolicy
from trtllm_core.plugin import Edits, KVPolicyRegistrar, KVStatistics, Move, hookimpl
from trtllm_core.testing.markov import MarkovExecutable


class Listens(ContiguousPolicy):
    """Writes down what it is told, and answers what it was given."""

    needs = frozenset({"attention_scores"})
    told: list[Any] = []  # noqa: RUF012
    answer = Edits()

    def plan(self, model: Any, budget: Any) -> Any:
        self.told.clear()
        return replace(super().plan(model, budget), evicts=True, rewindable=0)

    def after_prefill(self, slots: Any, statistics: KVStatistics | None = None) -> Any:
        assert statistics is not None
        shapes = [scores.shape for scores in statistics.attention]
        self.told.append(("prefill", list(slots), [self.length(slot) for slot in slots], shapes))
        return self.answer

    def after_step(self, slots: Any, statistics: KVStatistics | None = None) -> Any:
        self.told.append(("step", list(slots), [self.length(slot) for slot in slots], None))


def runner(answer: Edits, model: MarkovExecutable | None = None) -> ModelRunner:
    policy = type("Answers", (Listens,), {"answer": answer})

    class Plugin:
        hook_api = "kv_policy>=1.0,<2"

        @hookimpl
        def trtllm_register_kv_policies(self, registrar: KVPolicyRegistrar) -> None:
            registrar.add("answers", policy)

    cache = KVCacheConfig(policy="answers")
    return ModelRunner.from_engine(model or MarkovExecutable(), plugins=Plugins.load(extra=[Plugin()]), kv_cache=cache)


def test_who_hears_what_and_when() -> None:
    """A prompt's last part is its prefill, everything else a step; what was written is committed."""
    build = MarkovExecutable().config.build.replace(max_num_tokens=8)
    runner(Edits(), MarkovExecutable(build=build)).generate([[5] * 11, [7]], max_new_tokens=2, end_id=())
    assert Listens.told == [
        ("step", [0], [8], None),
        ("prefill", [1, 0], [1, 11], [(1, 1, 1), (1, 1, 11)]),
        ("step", [0, 1], [12, 2], None),
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Edits(moves=(Move(0, 5, 0),)), "Answers moves entries that are not there"),
        (Edits(moves=(Move(0, 0, -1),)), "Answers moves entries that are not there"),
        (Edits(drops=((0, 1),)), "Answers drops 1 entries, but has 3 left"),
    ],
)
def test_what_is_not_so_stops_the_loop(answer: Edits, words: str) -> None:
    with pytest.raises(PluginContractError, match=words):
        runner(answer).generate([[5, 6, 7]], max_new_tokens=3, end_id=())


def test_a_backend_that_moves_nothing_refuses_early() -> None:
    model = MarkovExecutable()
    model.capabilities = replace(model.capabilities, kv=frozenset())
    with pytest.raises(ConfigError, match="Answers needs attention scores and entries that move and are dropped"):
        runner(Edits(), model)
    assert model.calls == 0
