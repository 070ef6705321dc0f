"""Memory and graphs by ``cuda.core``: that it has what is called, and that it is called in the right order."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtllm_core.backends.tensorrt.cuda import CoreCuda, TorchCuda, cuda_of

DEVICE = torch.device("cuda", 1)


class Recorder:
    """Stands for every object of ``cuda.core``: notes what is called, with what."""

    def __init__(self, calls: list[Any], name: str, handle: int = 0) -> None:
        self._calls, self._name, self.handle = calls, name, handle

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **options: Any) -> Recorder:
            self._calls.append((f"{self._name}.{method}", *args, *options.values()))
            return Recorder(self._calls, method, 77)

        return call


def recorded() -> tuple[CoreCuda, list[Any]]:
    calls: list[Any] = []

    def device(index: int) -> Recorder:
        calls.append(("Device", index))
        found = Recorder(calls, "device")
        found.default_stream = "the default stream"  # type: ignore[attr-defined]
        return found

    stream = SimpleNamespace(from_handle=lambda handle: f"stream {handle}")
    return CoreCuda(DEVICE, SimpleNamespace(Device=device, Stream=stream)), calls


def test_memory() -> None:
    cuda, calls = recorded()
    block = cuda.allocate(512)
    assert (block.address, block.size) == (77, 512)
    assert calls == [
        ("Device", 1),
        ("device.set_current",),
        ("device.allocate", 512, "the default stream"),
        ("device.sync",),
    ]


def test_a_graph_is_captured_on_a_stream_of_its_own_and_launched_where_it_is_asked_for() -> None:
    cuda, calls = recorded()
    enqueued: list[int] = []
    launch = cuda.capture(enqueued.append)
    assert enqueued == [77]
    assert [name for name, *_ in calls[2:]] == [
        "device.create_stream",
        "create_stream.create_graph_builder",
        "create_graph_builder.begin_building",
        "create_graph_builder.end_building",
        "create_graph_builder.complete",
    ]
    launch(9)
    launch(0)
    assert calls[-2:] == [("complete.launch", "stream 9"), ("complete.launch", "the default stream")]


def test_what_cannot_be_captured_ends_the_capture() -> None:
    cuda, calls = recorded()

    def refuse(stream: int) -> None:
        raise ValueError(stream)

    with pytest.raises(ValueError, match="77"):
        cuda.capture(refuse)
    assert calls[-1][0] == "create_graph_builder.end_building"


def test_cuda_core_has_what_is_called() -> None:
    core = pytest.importorskip("cuda.core")
    graph = pytest.importorskip("cuda.core.graph")
    for owner, names in (
        (core.Device, ("set_current", "allocate", "sync", "create_stream", "default_stream")),
        (core.Stream, ("from_handle", "handle", "create_graph_builder")),
        (graph.GraphBuilder, ("begin_building", "end_building", "complete")),
        (graph.Graph, ("launch",)),
        (core.Buffer, ("handle",)),
    ):
        assert all(hasattr(owner, name) for name in names), owner
    assert "stream" in str(inspect.getdoc(core.Device.allocate))
    assert "thread_local" in str(inspect.getdoc(graph.GraphBuilder.begin_building))


def test_which_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert type(cuda_of(DEVICE)) is TorchCuda
    device = lambda index: Recorder([], "device")  # noqa: E731
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(Device=device))
    assert type(cuda_of(DEVICE)) is CoreCuda
