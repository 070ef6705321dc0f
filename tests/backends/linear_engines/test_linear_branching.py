"""Verifying drafts and searching with beams on engines of the padded, linear contract: as on the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core import BuildConfig, Executor, ModelRunner, Plugins, SamplingConfig, Session, build_engine, use
from trtllm_core.backends.tensorrt.executable import TensorRTExecutable
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import CONTEXT, GENERATION, profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import HostLogitsProcessor, LogitsCapabilities
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.host_cuda import HostCuda

from .conftest import LIMITS, MakeGraph

PROMPTS = [[5, 6, 7, 8] * 5, [11], [3, 4, 3, 4, 3, 4, 3], [42, 17, 42]]
GREEDY = SamplingConfig(max_new_tokens=24, end_id=(), return_dict=True)
WIDE: BuildConfig = LIMITS.replace(max_batch_size=2, max_beam_width=3, dtype="float32", gather_context_logits=True)
"""Room for two requests of three beams."""
DRAFTS = 3
"""``max_draft_len`` of the TensorRT engine."""


class OneOfThree(HostLogitsProcessor):
    """Leaves so few tokens that texts repeat themselves, which n-grams live on."""

    capabilities = LogitsCapabilities(speculation="rewind")

    def mask(self, state: Any, tokens: Any, words: Any) -> bool:
        words.view("uint32")[:] = 0
        words.view("uint32")[0] = 0b1011_0000
        return True


Both = Callable[..., tuple[list[Any], list[Any]]]


@pytest.fixture(scope="module")
def torch_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Session:
    directory = tmp_path_factory.mktemp("torch") / "engine"
    build_engine(checkpoint, directory, WIDE, plugins=plugins)
    return Session.from_directory(directory, plugins=plugins)


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt"])
def engine(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    make_graph: MakeGraph,
    tmp_path_factory: pytest.TempPathFactory,
    plugins: Plugins,
) -> Session:
    if request.param == "onnxruntime":
        directory = tmp_path_factory.mktemp("onnx") / "engine"
        build_engine(checkpoint, directory, WIDE.replace(backend="onnxruntime"), plugins=plugins)
        return Session.from_directory(directory, plugins=plugins)
    graph = make_graph("lower_right", "float32", checkpoint)
    config = graph.config.replace(build=WIDE.replace(backend="tensorrt"))
    profiles = list(profile_shapes(config, TensorRTOptions(max_draft_len=DRAFTS)))
    runtime = TensorRTRuntime(double, double.serialise(graph.path, profiles), HostCuda())
    return Session.from_engine(TensorRTExecutable(config, runtime, torch.device("cpu")))


@pytest.fixture
def both(engine: Session, torch_engine: Session, plugins: Plugins) -> Both:
    """What this engine gives, and what the torch engine gives."""

    def generate(sampling: SamplingConfig, prompts: Any = PROMPTS, **options: Any) -> tuple[list[Any], list[Any]]:
        results = []
        for session in (engine, torch_engine):
            with ModelRunner.from_engine(session, plugins=plugins) as runner:
                waves = [prompts[at : at + 2] for at in range(0, len(prompts), 2)]
                outputs = [one for wave in waves for one in runner.generate(wave, sampling, **options)["outputs"]]
                results.append(outputs)
        return results[0], results[1]

    return generate


def texts(outputs: list[Any]) -> list[tuple[Any, ...]]:
    return [(one.tokens, one.finish_reason) for one in outputs]


@pytest.mark.parametrize("drafts", [DRAFTS, 6])
def test_prompt_lookup_gives_the_text_that_there_was(drafts: int, both: Both) -> None:
    """More drafts than max_draft_len run in the context profile."""
    few = OneOfThree()
    plain, _ = both(GREEDY, logits_processor=few)
    ours, theirs = both(GREEDY, decoder=use("ngram", tokens=drafts), logits_processor=few)
    assert texts(ours) == texts(plain) == texts(theirs)
    assert sum(one.accepted_tokens for one in ours) > 20
    assert [one.accepted_tokens for one in ours] == [one.accepted_tokens for one in theirs]


def test_a_stop_inside_a_draft(both: Both, torch_engine: Session) -> None:
    """The text ends at the stop, however many drafts after it were right; its neighbour goes on."""
    plain, _ = both(GREEDY)
    stop = plain[0].tokens[9]
    config = GREEDY.replace(stop_words_list=((stop,),))
    draft_engine = torch_engine  # the same model: its drafts are always right
    ours, theirs = both(config, decoder=use("draft_model", session=draft_engine, tokens=DRAFTS))
    alone, _ = both(config)
    assert texts(ours) == texts(theirs) == texts(alone)
    assert ours[0].finish_reason != "length"


def test_drafts_of_a_model(both: Both, torch_engine: Session) -> None:
    plain, _ = both(GREEDY)
    ours, theirs = both(GREEDY, decoder=use("draft_model", session=torch_engine, tokens=DRAFTS))
    assert texts(ours) == texts(plain) == texts(theirs)
    assert ours[0].accepted_tokens == ours[0].drafted_tokens > 10


def test_an_engine_drafts(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """A linear engine as the draft model of another."""
    with ModelRunner.from_engine(torch_engine, plugins=plugins) as runner:
        plain = runner.generate(PROMPTS[:2], GREEDY)["outputs"]
        drafted = runner.generate(PROMPTS[:2], GREEDY, decoder=use("draft_model", session=engine, tokens=DRAFTS))
    assert texts(drafted["outputs"]) == texts(plain)


@pytest.mark.parametrize("fields", [{}, {"length_penalty": 2.0}, {"num_return_sequences": 3}])
def test_beams_are_copies_of_rows(fields: dict[str, Any], both: Both) -> None:
    sampling = GREEDY.replace(num_beams=3, max_new_tokens=12, output_cum_log_probs=True, **fields)
    ours, theirs = both(sampling)
    assert texts(ours) == texts(theirs)
    assert np.allclose([one.cum_log_prob for one in ours], [one.cum_log_prob for one in theirs], atol=1e-4)
    greedy, _ = both(GREEDY.replace(max_new_tokens=12))
    assert texts(ours[: len(greedy)]) != texts(greedy), "or the beams would show nothing"


def test_logits_of_every_prompt_token(both: Both) -> None:
    """A plan without gather_all_token_logits gives a few a run: it runs as often as it takes."""
    ours, theirs = both(GREEDY.replace(max_new_tokens=2), PROMPTS[2:])
    for one, other in zip(ours, theirs, strict=True):
        assert one.context_logits.shape[0] == len(one.prompt)
        assert torch.allclose(one.context_logits, other.context_logits, atol=1e-4)


def test_in_flight_batching(engine: Session, torch_engine: Session, plugins: Plugins) -> None:
    """Requests join and leave while others run: their rows of the caches are taken over, and forks are copied."""
    wanted = [GREEDY, GREEDY.replace(max_new_tokens=5), GREEDY.replace(num_beams=3, max_new_tokens=8), GREEDY]
    results = []
    for session in (engine, torch_engine):
        with ModelRunner.from_engine(session, plugins=plugins) as runner, Executor(runner) as executor:
            handles = [executor.submit(*one) for one in zip(PROMPTS, wanted, strict=True)]
            results.append([texts(handle.result(60)) for handle in handles])
    assert results[0] == results[1]


def test_both_profiles_ran(engine: Session, both: Both) -> None:
    runtime = getattr(engine.engine, "runtime", None)
    if runtime is None:
        pytest.skip("an engine of one profile")
    both(GREEDY, decoder=use("ngram", tokens=DRAFTS))
    assert {context.profile for context in runtime.engine.contexts} == {CONTEXT, GENERATION}


def test_what_is_refused_before_the_first_token(engine: Session, plugins: Plugins) -> None:
    with ModelRunner.from_engine(engine, plugins=plugins) as runner:
        with pytest.raises(CapacityError, match=r"64"):
            runner.generate([[1] * 40], GREEDY.replace(max_new_tokens=25))
        with pytest.raises((CapacityError, ConfigError), match="3"):
            runner.generate([[1]], GREEDY.replace(num_beams=4))
        with pytest.raises(CapacityError, match="48"):
            runner.generate([[1] * 49], GREEDY.replace(max_new_tokens=1))
