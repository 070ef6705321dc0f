"""Our own kernels for the CPU against the formulas in float64, and what happens where they cannot be compiled."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu import compiling
from trtllm_core.backends.torch.cpu.kernels import DTYPES, Kernels
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.session import Session

Load = Callable[..., Session]
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Of a rounded result, relative."""


@pytest.fixture(params=list(DTYPES), ids=str)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return Kernels(request.param, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", [1, 7, 64, 576, 4099])
@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (64,)])
def test_rms_norm(kernels: Kernels, size: int, rows: tuple[int, ...]) -> None:
    x = (3 * torch.randn(*rows, size)).to(kernels.dtype)
    weight = torch.randn(size).to(kernels.dtype)
    expected = functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5).double(), expected, rtol=ULP[kernels.dtype], atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 64, 1536])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (64,)])
def test_silu_gate(kernels: Kernels, size: int, rows: tuple[int, ...]) -> None:
    x = (10 * torch.randn(*rows, 2 * size)).to(kernels.dtype)
    gate, up = x.double().chunk(2, -1)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(kernels.silu_gate(x).double(), expected, rtol=ULP[kernels.dtype], atol=1e-6)


def test_silu_gate_far_out(kernels: Kernels) -> None:
    """Where e^x leaves float32."""
    gate = torch.tensor([-1e30, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 1e30])
    x = torch.cat((gate, torch.ones(8))).to(kernels.dtype)
    expected = functional.silu(x[:8].double())
    ours = kernels.silu_gate(x).double()
    torch.testing.assert_close(ours, expected, rtol=ULP[kernels.dtype], atol=1e-3)
    told = kernels.silu_gate(torch.tensor([float("nan"), 1.0, 2.0, 1.0]).to(kernels.dtype))
    assert told[0].isnan()
    assert not told[1].isnan()


def test_views_are_read_as_they_are(kernels: Kernels) -> None:
    x = torch.randn(6, 32).to(kernels.dtype)
    weight = torch.ones(16, dtype=kernels.dtype)
    assert torch.equal(kernels.rms_norm(x[:, ::2], weight, 1e-5), kernels.rms_norm(x[:, ::2].clone(), weight, 1e-5))
    assert torch.equal(kernels.silu_gate(x.t()), kernels.silu_gate(x.t().clone()))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Load) -> None:
    compiling.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TRTLLM_CORE_CACHE", str(tmp_path))
    try:
        with pytest.raises(EngineUnsupportedError, match="no C\\+\\+ compiler; install one, or set CXX"):
            Kernels(torch.float32, tmp_path)
        load({})  # PyTorch's own kernels do
        with pytest.raises(EngineUnsupportedError, match="native"):
            load({"native": True})
    finally:
        compiling.library.cache_clear()


@pytest.mark.parametrize(
    "told",
    ["kernels.cpp:1: error: no", "In file included from kernels.cpp:1:\ntiles.h:1: error: no\ntiles.h:2: error: more"],
)
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "{told}" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compiling.library.cache_clear()
    try:
        with pytest.raises(EngineUnsupportedError, match=r"cannot compile the kernels: \w+\.\w+:1: error: no$"):
            Kernels(torch.float32, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == [], "nothing half made stays"
    finally:
        compiling.library.cache_clear()


@pytest.mark.parametrize("program", ["no program", "#!/bin/sh\nexec sleep 60\n"], ids=["broken", "hung"])
def test_a_compiler_that_does_not_tell_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(program)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(compiling, "TIMEOUT", 0.2)
    with pytest.raises(EngineUnsupportedError, match="the kernels cannot be compiled or loaded"):
        compiling.library(tmp_path / "cache")


def test_a_library_that_cannot_be_loaded_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = compiling._compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sources, folder = tmp_path / "native", tmp_path / "cache"
    sources.mkdir()
    folder.mkdir()
    (sources / "kernels.cpp").write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setattr(compiling, "SOURCES", sources)
    monkeypatch.setattr(compiling, "SOURCE", sources / "kernels.cpp")
    monkeypatch.setattr(compiling, "FLAGS", ("-fPIC", "-shared"))
    path = folder / f"kernels-{compiling._key(compiler)}.so"
    path.write_bytes(b"half of a library")
    assert compiling.library(folder).seven() == 7
    assert list(folder.iterdir()) == [path]


def test_two_who_compile_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads, or containers with the same process number, over one folder."""
    both = threading.Barrier(2, timeout=10)

    def compiled(command: list[str], **_: object) -> None:
        Path(command[-1]).write_text(command[-1])
        both.wait()
        assert Path(command[-1]).read_text() == command[-1]
        both.wait()

    monkeypatch.setattr(subprocess, "run", compiled)
    path = tmp_path / "kernels.so"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: compiling._compile("c++", path), range(2)))
    assert list(tmp_path.iterdir()) == [path]
