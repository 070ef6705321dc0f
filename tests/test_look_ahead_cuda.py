"""Look-ahead on a GPU: the tails of steps are captured and replayed, and the tokens are those of a loop that waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_look_ahead import Counts, StopsAt
from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.plugin import DeviceLogitsProcessor, LogitsCapabilities
from trtllm_core.testing.checkpoints import write_llama

pytestmark = pytest.mark.cuda

BASE = SamplingConfig(end_id=(), max_new_tokens=24, return_dict=True)
DRAWS = BASE.replace(top_k=0, top_p=0.9, temperature=0.8, random_seed=3)
PROMPTS = [[1 + i, 2 + i, 3] * (1 + i) for i in range(6)]


class Lies(DeviceLogitsProcessor):
    """Says that it can be captured, and looks at what is on the device."""

    capabilities = LogitsCapabilities(graph_safe=True)

    def apply(self, logits: torch.Tensor, batch: Any) -> None:
        if float(logits[0, 0]) > 1e9:
            raise AssertionError


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    folder, plugins = tmp_path_factory.mktemp("engine"), Plugins.load()
    limits = BuildConfig(max_batch_size=8, max_beam_width=2, max_input_len=64, max_seq_len=128)
    build_engine(write_llama(folder / "hf"), folder / "engine", limits, plugins=plugins)
    cache = KVCacheConfig(max_tokens=1024)
    waits, looks = (
        ModelRunner.from_dir(folder / "engine", plugins=plugins, kv_cache=cache, device="cuda", look_ahead=ahead)
        for ahead in (False, True)
    )
    return waits, looks


@pytest.mark.parametrize(
    ("config", "plugins", "captures"),
    [
        (BASE, {}, True),
        (BASE.replace(end_id=tuple(range(0, 60, 5)), min_length=9), {}, True),
        (DRAWS, {}, True),
        (DRAWS.replace(top_k=8), {}, True),
        (DRAWS.replace(repetition_penalty=1.3, frequency_penalty=0.2, no_repeat_ngram_size=2), {}, True),
        (DRAWS.replace(bad_words_list=[[5], [6, 7]], stop_words_list=[[3], [8, 9]], top_p_decay=0.9), {}, True),
        (DRAWS.replace(stopping_criteria=use("confidence", above=0.9, steps=2)), {}, True),
        (DRAWS.replace(top_p=0.0, decoder=use("mirostat")), {}, True),
        (DRAWS, {"stopping_criteria": lambda: StopsAt(9)}, True),
        (DRAWS, {"logits_processor": Counts}, False),
        (DRAWS, {"logits_processor": lambda: Counts("apply", 9)}, False),
        (DRAWS, {"logits_processor": Lies}, False),
        ([DRAWS, BASE, DRAWS.replace(max_new_tokens=9), BASE, DRAWS, BASE], {}, True),
        (DRAWS.replace(num_beams=2, decoder="beam_search"), {}, False),
    ],
)
def test_the_same_answers(
    runners: tuple[ModelRunner, ModelRunner], config: Any, plugins: dict[str, Any], captures: bool
) -> None:
    def answers(runner: ModelRunner) -> list[tuple[Any, ...]]:
        result = runner.generate(PROMPTS, config, **{name: make() for name, make in plugins.items()})
        return [(o.tokens, o.finish_reason, type(o.error)) for o in result["outputs"]]

    tails = runners[1].generation.loop._tails
    assert tails is not None
    before = sum(each is not None for each in tails._captured.values())
    here, ahead = map(answers, runners)
    assert ahead == here
    assert (sum(each is not None for each in tails._captured.values()) > before) == captures
    assert answers(runners[1]) == here, "replayed"


def test_verify_steps_do_not_move_what_graphs_have_captured(runners: tuple[ModelRunner, ModelRunner]) -> None:
    _, runner = runners
    first = runner.generate(PROMPTS, DRAWS)["outputs"]
    runner.generate(PROMPTS, BASE.replace(decoder=use("ngram", tokens=7)))
    assert [o.tokens for o in runner.generate(PROMPTS, DRAWS)["outputs"]] == [o.tokens for o in first]
