"""``debug_mode``: the tensors of each run, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_core import BuildConfig, GenerationSession, Plugins, SamplingConfig, build_engine
from trtllm_core.debugging import DebugBuffers
from trtllm_core.errors import ConfigError
from trtllm_core.testing.checkpoints import write_llama

GREEDY = SamplingConfig(max_new_tokens=4, end_id=())
LIMITS = BuildConfig(max_batch_size=2, max_input_len=8, max_seq_len=16, dtype="float32")


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    config = build_engine(write_llama(place / "hf"), place / "engine", LIMITS.replace(backend=request.param))
    return place / "engine" / config.ranks[0].name


def generate(session: GenerationSession) -> list[int]:
    session.setup(1, 3, 4)
    found = session.decode(torch.tensor([[5, 6, 7]]), torch.tensor([3]), GREEDY)
    return found[0, 0].tolist()


def make(engine: Path, **options: object) -> GenerationSession:
    from trtllm_core.engine.directory import read_config
    from trtllm_core.engine.load import load_engine
    from trtllm_core.session import Session

    plugins = Plugins.load()
    session = Session.from_engine(load_engine(engine, plugins, read_config(engine.parent)))
    return GenerationSession(None, session, plugins=plugins, **options)  # type: ignore[arg-type]


def test_every_run_is_written(engine: Path, tmp_path: Path) -> None:
    plain = generate(make(engine))
    session = make(engine, debug_mode=True, debug_dir=tmp_path)
    assert generate(session) == plain
    files = {path.name for path in (tmp_path / "rank0").iterdir()}
    assert {f"logits-step{step}.npy" for step in range(4)} <= files
    linear = "cache_rows-step0.npy" in files
    between = {"present_key_0", "present_value_1"} if linear else {"hidden", "layers.0", "layers.1"}
    assert {f"{name}-step3.npy" for name in between} <= files
    for step, token in enumerate(plain[3:7]):
        logits = np.load(tmp_path / "rank0" / f"logits-step{step}.npy")
        assert logits.reshape(-1).argmax() == token
    ids = np.load(tmp_path / "rank0" / "input_ids-step1.npy")
    assert ids.reshape(-1).tolist() == [plain[3]]
    if linear:
        assert np.load(tmp_path / "rank0" / "present_key_0-step3.npy").shape[2] == 6  # 3 of the prompt, 3 fed back


def test_what_is_asked_for_is_written(engine: Path, tmp_path: Path) -> None:
    session = make(engine, debug_mode=True, debug_tensors_to_save=("logits",))
    generate(session)
    (path,) = session.dump_debug_buffers(7, tmp_path)
    assert path == tmp_path / "rank0" / "logits-step7.npy"
    assert session.session.debug is not None
    assert session.session.debug.steps == 4
    assert np.array_equal(np.load(path), session.session.debug.tensors["logits"].numpy())


def test_no_dumps_without_debug_mode(engine: Path) -> None:
    with pytest.raises(ConfigError, match="not in debug_mode"):
        make(engine).dump_debug_buffers(0)
    with pytest.raises(ConfigError, match="need debug_mode"):
        make(engine, debug_dir="somewhere")


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    buffers = DebugBuffers(rank=3)
    buffers.take({"x": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)})
    (path,) = buffers.dump(0, tmp_path)
    assert path.parent.name == "rank3"
    assert np.load(path).tolist() == [1.5, 2.0]
