"""Decode steps on the CPU as recorded programs: the same results as without, whatever the batch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.operations import Product
from trtllm_core.backends.torch.cpu.packed import PackedWeight
from trtllm_core.backends.torch.cpu.program import NotRecordableError, Watch
from trtllm_core.backends.torch.cpu.rounding import measure_rounding
from trtllm_core.backends.torch.cpu.steps import DecodeProgram, StepPrograms
from trtllm_core.config import BuildConfig, QuantizationConfig, QuantizedLayer, SamplingConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.plugin import Plugins
from trtllm_core.quantize import quantize
from trtllm_core.runner import ModelRunner

PROMPTS = [[1, 5, 9, 33], [7, 60], [3, 2, 1, 4, 8, 6, 21, 22, 23, 24, 25]]
LIMITS = BuildConfig(
    dtype="float32",
    max_seq_len=64,
    max_input_len=40,
    max_batch_size=4,
    tokens_per_block=8,
    quantization=QuantizationConfig(weights="keep"),
)


@pytest.fixture(scope="module")
def engine(quantised_gguf: Path, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        Kernels(torch.float32, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("programs") / "engine"
    build_engine(quantised_gguf, path, LIMITS, plugins=plugins)
    return path


def runner(engine: Path, plugins: Plugins, **options: Any) -> ModelRunner:
    return ModelRunner.from_dir(engine, plugins=plugins, **options)


def programs(runner: ModelRunner) -> StepPrograms:
    found = runner.session.engine._graphs  # type: ignore[attr-defined]
    assert isinstance(found, StepPrograms)
    return found


def generate(runner: ModelRunner, prompts: Any = PROMPTS, **more: Any) -> Any:
    return runner.generate(prompts, sampling_config=SamplingConfig(**{"max_new_tokens": 12, "end_id": (), **more}))


def logits(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of each run of the engine, while it generates."""
    execute, seen = runner.session.engine.execute, []

    def watched(inputs: Any, outputs: Any, stream: int) -> None:
        execute(inputs, outputs, stream)
        seen.append(outputs["logits"].clone())

    monkeypatch.setattr(runner.session.engine, "execute", watched)
    generate(runner)
    return seen


def test_programs_compute_what_the_module_does(engine: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner(engine, plugins, int8_activations=False)
    ours = logits(one, monkeypatch)
    assert set(programs(one).programs) == {3}
    monkeypatch.setattr(StepPrograms, "find", lambda self, inputs: None)
    for found, wanted in zip(ours, logits(runner(engine, plugins, int8_activations=False), monkeypatch), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_that_shrinks_and_grows(engine: Path, plugins: Plugins) -> None:
    one, twin = runner(engine, plugins, int8_activations=False), runner(engine, plugins, native=False)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:], PROMPTS):
        assert generate(one, prompts).tolist() == generate(twin, prompts).tolist()
    assert set(programs(one).programs) == {1, 2, 3}
    assert programs(one).refused is None


def test_norms_and_gates_are_part_of_products(engine: Path, plugins: Plugins) -> None:
    one = runner(engine, plugins)
    generate(one, PROMPTS[:1])
    program = programs(one).programs[1].program
    assert len(program) == 1 + 2 * 5 + 1  # a lookup; qkv, attention, output, gate and up, down of each layer; the head
    products = [Product.from_address(each.arguments) for each in program._operations if each.run == program_linear(one)]
    assert sorted(each.before for each in products) == [0, 0, 1, 1, 1, 1, 1, 2, 2]


def program_linear(runner: ModelRunner) -> int:
    return runner.session.engine._native.kernels._linear  # type: ignore[attr-defined, no-any-return]


def test_rounded_activations_cost_little(engine: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = runner(engine, plugins)
    if not rounding.session.engine._native.kernels.multiplies_bytes:  # type: ignore[attr-defined]
        pytest.skip("no instructions for it")
    # The prompts' own logits are those of many rows, which are not rounded.
    found = logits(rounding, monkeypatch)[1]
    wanted = logits(runner(engine, plugins, int8_activations=False), monkeypatch)[1]
    error = ((found - wanted).square().mean() / wanted.var()).sqrt()
    assert 0 < error < 0.1


def test_what_rounding_costs_is_measured(engine: Path, plugins: Plugins) -> None:
    """Before anything runs, and without a trace."""
    one = runner(engine, plugins)
    text = torch.arange(1, 31)
    found = measure_rounding(one.session.engine, text)  # type: ignore[arg-type]
    if not one.session.engine._native.kernels.multiplies_bytes:  # type: ignore[attr-defined]
        assert found is None
        return
    assert found is not None
    assert found.rounded.shape == (29, one.config.model.vocab_size)
    assert 0 < found.error < 0.1 * found.spread
    assert generate(one).tolist() == generate(runner(engine, plugins)).tolist()
    exact = runner(engine, plugins, int8_activations=False)
    assert measure_rounding(exact.session.engine, text) is None  # type: ignore[arg-type]


def test_packed_weights_count_as_they_are_read(engine: Path, plugins: Plugins) -> None:
    packed, mapped = (runner(engine, plugins, native=native).session.context_mem_size for native in (None, False))
    assert 0.5 * mapped < packed < mapped  # scales and offsets have half the bytes


def test_a_module_that_does_more_runs_as_it_is(checkpoint: Path, plugins: Plugins, tmp_path: Path) -> None:
    """Weights that are not quantised are PyTorch's to multiply."""
    build_engine(checkpoint, tmp_path / "engine", LIMITS.replace(quantization=None), plugins=plugins)
    one = runner(tmp_path / "engine", plugins)
    assert generate(one).tolist() == generate(runner(tmp_path / "engine", plugins, native=False)).tolist()
    assert programs(one).refused is not None
    assert programs(one).refused.startswith("aten::")  # type: ignore[union-attr]
    assert not programs(one).programs


def test_what_others_read_is_computed(plugins: Plugins) -> None:
    """A norm that is an attention's input too, say, is no part of the products that read it."""
    try:
        kernels = Kernels(torch.float32, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))
    x, weight = torch.randn(3, 64), torch.randn(64)
    with kernels.record() as program, Watch():
        inner = kernels.rms_norm(x, weight, 1e-5)
        outer = kernels.rms_norm(inner, weight, 1e-5)
        with pytest.raises(NotRecordableError, match="aten::add"):
            outer + 1
    assert len(program) == 1  # the inner norm, which the outer one reads


Norm = Callable[[torch.Tensor], torch.Tensor]
VIEWS: dict[str, Callable[[Norm, torch.Tensor], torch.Tensor]] = {
    "a norm of a norm": lambda norm, x: norm(norm(x)),
    "the first half of a norm": lambda norm, x: norm(x)[:, :32],
    "the second half of a norm": lambda norm, x: norm(x)[:, 32:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_read_in_part_is_computed(view: str) -> None:
    """A product takes over a norm of its own rows alone, and what the norm reads was computed before."""
    try:
        kernels = Kernels(torch.float32, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))
    x, gain = torch.randn(1, 64), torch.randn(64)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, gain, 1e-5)

    inputs = VIEWS[view](norm, x).shape[-1]
    how = QuantizedLayer(bits=8, group_size=32, form="symmetric")
    packed = PackedWeight(quantize(torch.randn(16, inputs), how), 1 << 20)
    with kernels.record() as program, Watch():
        found = kernels.linear(packed.whole, VIEWS[view](norm, x))
    assert len(program) == 2
    program.run()
    torch.testing.assert_close(found, kernels.linear(packed.whole, VIEWS[view](norm, x)))


def test_programs_are_recorded_after_debugging(engine: Path, plugins: Plugins) -> None:
    one = runner(engine, plugins)
    wanted = generate(one, PROMPTS[:1]).tolist()
    one.session.engine.debugging = True
    assert generate(one, PROMPTS[:2])[0].tolist() == wanted[0]
    assert {"hidden", "layers.0", "layers.1"} <= one.session.engine.debug_tensors().keys()
    one.session.engine.debugging = False
    generate(one, PROMPTS[:2])
    assert one.session.engine.debug_tensors() == {}
    assert programs(one).refused is None
    assert set(programs(one).programs) == {1, 2}


def test_programs_that_there_are_run_whatever_was_refused(
    engine: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, run, runs = runner(engine, plugins), DecodeProgram.run, []
    wanted = generate(one, PROMPTS[:1]).tolist()

    def counted(self: DecodeProgram, *args: Any) -> None:
        runs.append(self)
        run(self, *args)

    monkeypatch.setattr(DecodeProgram, "run", counted)
    programs(one).refused = "aten::clone"
    assert generate(one, PROMPTS[:1]).tolist() == wanted
    assert len(runs) == 11
    generate(one, PROMPTS[:2])
    assert set(programs(one).programs) == {1}
