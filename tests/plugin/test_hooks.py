"""Each hook once, for real: the example of its docstring is loaded, and what it registers is used.

A test is named after each hook; ``test_docs.py`` fails when one is missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.plugin import (
    HOOK_KINDS,
    BranchView,
    DecodingContext,
    LogitsBatch,
    Plugins,
    RequestStats,
    SessionStats,
    StepStats,
)
from trtllm_core.plugin.specs import SPECS

Example = Callable[[str], tuple[Plugins, ModuleType]]
SESSION = SessionStats(family="llama", backend="torch", max_batch_size=1, kv_blocks=8, kv_bytes=64, weight_bytes=4096)
STEP = StepStats(step=1, rows=2, context_tokens=0, generation_tokens=2, kv_blocks_free=3, seconds=0.1)
REQUEST = RequestStats(request_id="r1", prompt_tokens=4, generated_tokens=9, finish_reason="length")


@pytest.fixture
def example(module) -> Example:
    """Loads the example in a hook's docstring as a plugin, and nothing else."""

    def load(hook: str) -> tuple[Plugins, ModuleType]:
        doc = getattr(SPECS[HOOK_KINDS[hook]], hook).__doc__
        made = module(textwrap.dedent(doc.split("Example::")[1]))
        plugins = Plugins.load(entry_points=(), extra=[getattr(made, "plugin", made)])
        (report,) = plugins.report()
        assert (report.status, report.hooks) == ("loaded", (hook,))
        return plugins, made

    return load


def batch(n: int, vocab: int) -> LogitsBatch:
    """A step of ``n`` rows, the first of which did not ask for the plugin."""
    context = DecodingContext(
        slots=n,
        max_seq_len=8,
        vocab_size=vocab,
        vocab_size_padded=vocab,
        device=torch.device("cpu"),
        tokens=torch.zeros(n, 8, dtype=torch.int32),
        lengths=torch.ones(n, dtype=torch.int64),
        prompt_lengths=torch.ones(n, dtype=torch.int64),
        seeds=torch.arange(n),
    )
    active = torch.ones(n, dtype=torch.bool)
    active[0] = False
    return LogitsBatch(context, slot=torch.arange(n), offset=torch.zeros(n, dtype=torch.int64), active=active)


def test_trtllm_register_model_families(example: Example) -> None:
    plugins, _ = example("trtllm_register_model_families")
    entry = plugins.model_families.get("OPTForCausalLM")
    assert entry.name == "opt"
    assert entry.source.plugin == "mine"


def test_trtllm_register_decoders(example: Example) -> None:
    plugins, made = example("trtllm_register_decoders")
    sampler = plugins.decoders.get("largest").load()()
    assert isinstance(sampler, made.Largest)
    assert sampler.capabilities.greedy
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert sampler.sample(logits, batch(2, 3)).tolist() == [1, 0]


def test_trtllm_register_logits_processors(example: Example) -> None:
    plugins, _ = example("trtllm_register_logits_processors")
    processor = plugins.logits_processors.get("halve").load()()
    changed = processor.apply(torch.ones(2, 3), batch(2, 3))
    assert changed.tolist() == [[1.0] * 3, [0.5] * 3]


def test_trtllm_register_stopping_criteria(example: Example) -> None:
    plugins, _ = example("trtllm_register_stopping_criteria")
    criterion = plugins.stopping_criteria.get("repeats").load()()
    view = BranchView("r", 0, 0, prompt=[1, 2], sampling=SamplingConfig(), end_ids=(), seed=0)
    state = criterion.start(view)
    assert criterion.check(state, [1, 2], [3, 4]) is None
    assert criterion.check(state, [1, 2], [2]).at == 0
    stop = criterion.check(state, [1, 2], [3, 4, 4, 5])
    assert (stop.reason, stop.at) == ("repeats", 2)


def test_trtllm_register_kv_policies(example: Example) -> None:
    plugins, _ = example("trtllm_register_kv_policies")
    assert plugins.kv_policies.get("slabs").factory == "my_package.policy:SlabPolicy"


def test_trtllm_register_backends(example: Example) -> None:
    plugins, _ = example("trtllm_register_backends")
    found = plugins.backends.get("abacus").load()().probe()
    assert not found.available
    assert found.reason == "no abacus is plugged in"


def test_trtllm_on_session_start(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    plugins, _ = example("trtllm_on_session_start")
    plugins.on_session_start(SESSION)
    assert capsys.readouterr().out == "llama on torch: 4096 bytes of weights\n"


def test_trtllm_on_step_end(example: Example) -> None:
    plugins, made = example("trtllm_on_step_end")
    assert plugins.observes_steps
    plugins.on_step_end(STEP)
    plugins.on_step_end(STEP)
    assert made.plugin.tokens == 4


def test_trtllm_on_request_end(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    plugins, _ = example("trtllm_on_request_end")
    assert not plugins.observes_steps
    plugins.on_request_end(REQUEST)
    assert capsys.readouterr().out == "r1: 9 tokens, length\n"


def test_trtllm_on_session_end(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    plugins, _ = example("trtllm_on_session_end")
    plugins.on_session_end(SESSION)
    assert capsys.readouterr().out == "llama is closed\n"
