"""``Session``: the classic semantics of shapes and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.engine.load import load_directory
from trtllm_core.errors import TrtllmCoreError
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session, TensorInfo
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.packed import PackedRows

LIMITS = BuildConfig(max_batch_size=4, max_seq_len=64, max_input_len=40, max_num_tokens=32, tokens_per_block=16)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    folder = tmp_path_factory.mktemp("session")
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return folder / "engine"


@pytest.fixture
def session(engine: Path, plugins: Plugins) -> Session:
    return Session.from_directory(engine, plugins=plugins)


@pytest.fixture
def inputs(session: Session) -> dict[str, torch.Tensor]:
    """Two rows, five tokens."""
    return PackedRows(session, 2).inputs({0: [1, 2, 3], 1: [4, 5]})


def infos(inputs: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in inputs.items()]


def test_properties(session: Session, engine: Path) -> None:
    assert session.engine.config is session.config
    assert session.config.build.max_batch_size == 4
    assert session.device == torch.device("cpu")
    parameters = sum(p.numel() for p in session.engine.module.parameters())  # type: ignore[attr-defined]
    assert session.context_mem_size == 4 * parameters
    assert 0 < (engine / "rank0.safetensors").stat().st_size - session.context_mem_size < 10_000


def test_from_engine(engine: Path, plugins: Plugins) -> None:
    executable = load_directory(engine, plugins)
    assert Session.from_engine(executable).engine is executable


def test_tensor_info() -> None:
    info = TensorInfo("logits", torch.float32, (2, 3))
    assert (info.name, info.dtype, info.shape) == ("logits", torch.float32, (2, 3))
    assert info == TensorInfo("logits", torch.float32, (2, 3)) != TensorInfo("logits", torch.float16, (2, 3))


def test_infer_shapes(session: Session, inputs: dict[str, torch.Tensor]) -> None:
    assert session.infer_shapes(infos(inputs)) == [TensorInfo("logits", torch.float32, (5, 67))]
    inputs["logits_indices"] = torch.tensor([2, 4])
    assert session.infer_shapes(infos(inputs)) == [TensorInfo("logits", torch.float32, (2, 67))]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "error", "message"),
    [
        (
            "logits",
            torch.float32,
            (5, 67),
            ValueError,
            r"'logits' is not an input of the engine \(inputs: 'block_tables'",
        ),
        ("input_id", torch.int32, (5,), ValueError, "'input_id' is not an input"),
        ("input_ids", torch.int64, (5,), ValueError, "'input_ids' must be int32, not torch.int64"),
        ("input_ids", torch.int32, (33,), ValueError, r"shape \[33\], outside the engine's \[min \[1\], max \[32\]\]"),
        ("input_ids", torch.int32, (0,), ValueError, r"shape \[0\], outside the engine's \[min \[1\], max \[32\]\]"),
        ("input_ids", torch.int32, (1, 5), ValueError, r"shape \[1, 5\], outside"),
        (
            "block_tables",
            torch.int32,
            (2, 5),
            ValueError,
            r"\[2, 5\], outside the engine's \[min \[1, 1\], max \[4, 4\]\]",
        ),
        ("input_ids", torch.int32, (6,), RuntimeError, "has 5 tokens where another input has 6"),
        ("past_lengths", torch.int32, (3,), RuntimeError, "'past_lengths' has 3 rows where another input has 2"),
    ],
)
def test_shapes_that_do_not_fit(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    error: type[Exception],
    message: str,
    session: Session,
    inputs: dict[str, torch.Tensor],
) -> None:
    changed = [info for info in infos(inputs) if info.name != name] + [TensorInfo(name, dtype, shape)]
    if "where another input has 6" in message:
        changed.reverse()
    with pytest.raises(error, match=message) as caught:
        session.infer_shapes(changed)
    assert isinstance(caught.value, TrtllmCoreError)
    if "must be" not in message:
        tensors = {info.name: torch.empty(info.shape, dtype=info.dtype) for info in changed}
        with pytest.raises(error, match=message):
            session.set_shapes(tensors)


def test_an_input_that_an_output_needs(session: Session, inputs: dict[str, torch.Tensor]) -> None:
    del inputs["logits_indices"]
    with pytest.raises(RuntimeError, match="shape of output 'logits' needs the inputs that have 'asked'"):
        session.infer_shapes(infos(inputs))


def test_run(session: Session, inputs: dict[str, torch.Tensor]) -> None:
    session.set_shapes(inputs)
    outputs = {info.name: torch.full(info.shape, torch.nan) for info in session.infer_shapes(infos(inputs))}
    before = outputs["logits"].data_ptr()
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    assert session.run(inputs, outputs, 0) is True
    assert outputs["logits"].data_ptr() == before  # written in place
    assert outputs["logits"].isfinite().all()
    assert all(torch.equal(inputs[name], tensor) for name, tensor in given.items())
    again = torch.empty(5, 67)
    session.run(inputs, {"logits": again})  # no state but the cache, which is written with the same values
    assert torch.equal(again, outputs["logits"])


def test_run_lacks_something(session: Session, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"run\(\) lacks 'logits'"):
        session.run(inputs, {})
    del inputs["past_lengths"], inputs["block_tables"]
    with pytest.raises(ValueError, match=r"run\(\) lacks 'block_tables', 'past_lengths'"):
        session.run(inputs, {"logits": torch.empty(5, 67)})


def test_run_before_there_is_a_cache(
    engine: Path, plugins: Plugins, session: Session, inputs: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(RuntimeError, match="no KV cache yet: call allocate_kv"):
        Session.from_directory(engine, plugins=plugins).run(inputs, {"logits": torch.empty(5, 67)})
