"""A stand-in for a CUDA device in CPU memory: streams are numbers, and captured graphs are lists of calls.

It goes with ``tensorrt_double``. Work runs as soon as it is enqueued; what is asserted is that it would have been right
to enqueue it so on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from trtllm_core.backends.tensorrt.cuda import DeviceBlock, Enqueue, Launch

CAPTURE_STREAM = 1001

_capturing: dict[int, list[Callable[[], None]]] = {}
"""Of each stream that is captured now, its calls. CUDA keeps this for the process, too."""
_waits: set[tuple[int, int]] = set()
_users: dict[int, int] = {}
"""The stream on which each block of memory was used last."""


def enqueue(stream: int, work: Callable[[], None]) -> None:
    """Run work now, or when the graph that is being captured is launched."""
    if stream in _capturing:
        _capturing[stream].append(work)
    else:
        work()


def capturing(stream: int) -> bool:
    """Whether a stream is being captured."""
    return stream in _capturing


def use_memory(address: int, stream: int) -> None:
    """Raises AssertionError where memory is used on two streams that do not wait for each other."""
    last = _users.get(address, stream)
    assert stream == last or (stream, last) in _waits or stream in _capturing, (
        f"memory that stream {last} may still use is used on stream {stream}, which does not wait for it"
    )
    if stream not in _capturing:
        _users[address] = stream
        _waits.discard((stream, last))


class HostCuda:
    """``Cuda`` on the host."""

    def __init__(self) -> None:
        self.launches = 0
        """Of captured graphs."""
        self._current = 0

    def current(self) -> int:
        """The default stream, outside of ``on``."""
        return self._current

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """See ``Cuda``."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def allocate(self, size: int) -> DeviceBlock:
        """Host memory, aligned to 256 bytes."""
        room = torch.zeros(size + 255, dtype=torch.uint8)
        address = -(-room.data_ptr() // 256) * 256
        _users.pop(address, None)
        return DeviceBlock(address, size, room)

    def wait(self, stream: int, before: int) -> None:
        """Notes it. A stream that is captured cannot wait for one that is not."""
        assert not _capturing, "a captured stream waits for one that is not captured"
        _waits.add((stream, before))

    def capture(self, enqueue: Enqueue) -> Launch:
        """Calls are kept, and made when the graph is launched."""
        with _captured() as calls:
            enqueue(CAPTURE_STREAM)
        assert calls, "nothing was captured"

        def launch(stream: int) -> None:
            self.launches += 1
            for call in calls:
                call()

        return launch


@contextlib.contextmanager
def _captured() -> Iterator[list[Callable[[], None]]]:
    calls: list[Callable[[], None]] = []
    _capturing[CAPTURE_STREAM] = calls
    try:
        yield calls
    finally:
        del _capturing[CAPTURE_STREAM]
