"""Checks of code that runs on the device: no waiting, fixed shapes, the same on a GPU and in a captured graph."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence

import torch

from trtllm_core.testing.kit import cuda, need_gpu, passed_over, require
from trtllm_core.testing.lives import G, Life
from trtllm_core.testing.slotsubject import SlotSubject
from trtllm_core.testing.watch import HostWait, Operation, no_waiting, operations


class DeviceChecks(SlotSubject[G]):
    """The part of ``SlotConformance`` that is about the device; host plugins pass most of it over."""

    def ask_all(self, life: Life[G]) -> None:
        """All that the loop does between two ``begin``."""
        rig = life.rig
        rig.answers(list(rig.branches))

    def test_the_host_never_waits(self) -> None:
        """Device code brings no value to the host, and has no shape that depends on data."""
        if not self.on_device():
            passed_over("it is a host plugin")
        life = self.life(0)
        life.rig.watch = lambda _: no_waiting()
        try:
            self.ask_all(life)
            life.rig.commit({slot: life.tokens(1) for slot in life.rig.branches})
            life.rig.fork([(0, 1), (1, 0)])
            if self.speculates():
                life.rig.rewind(0, 1)
        except HostWait as wait:
            raise AssertionError(f"it is a device plugin, but {wait}") from wait

    def test_shapes_are_fixed(self) -> None:
        """What may be captured in a CUDA graph runs the same operations on the same shapes, whatever the data."""
        capabilities = self.subject().make().capabilities
        if not capabilities.graph_safe or not self.on_device():
            passed_over("it does not declare graph_safe")
        rig = (life := self.life(0)).rig
        traces: list[tuple[Hashable, list[Operation]]] = []
        for _ in range(4):
            trace: list[Operation] = []
            rig.watch = functools.partial(operations, trace)
            self.ask_all(life)
            rig.commit({slot: life.tokens(1) for slot in rig.branches})
            traces.append((rig.plugin.graph_key, trace))
        for (key, one), (other, two) in itertools.pairwise(traces):
            if key == other and one != two:
                raise AssertionError(f"it declares graph_safe, but two steps ran {_parting(one, two)}")

    def test_graph_key(self) -> None:
        """It is hashable, and changes where slots begin and end alone."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            key = rig.plugin.graph_key
            require(isinstance(key, Hashable), f"its graph_key {key!r} is not hashable")
            rig.answers(list(rig.branches))
            rig.commit(rig.possible({slot: life.tokens(1) for slot in rig.branches}))
            rig.fork([(0, 1), (1, 0)])
            require(rig.plugin.graph_key == key, "its graph_key changed, though no slot began or ended")

    @cuda
    def test_gpu_equals_cpu(self) -> None:
        """On a GPU it answers as on the CPU."""
        device = need_gpu()
        for seed in range(2):
            here, there = self.life(seed), self.life(seed, device=device)
            for life in (here, there):
                life.grow(3)
                life.fork()
            self.alike_on_gpu(here.rig, there.rig)

    def alike_on_gpu(self, here: G, there: G) -> None:
        """Two rigs that lived the same, one of them on a GPU, answer alike."""
        found = {s: a.cpu() if hasattr(a, "cpu") else a for s, a in there.answers(list(there.branches)).items()}
        self.same_answers(here, found, here.answers(list(here.branches)), "on a GPU it answers differently")

    @cuda
    def test_gpu_never_waits(self) -> None:
        """On a GPU, a step passes torch's sync debug mode."""
        device = need_gpu()
        if not self.on_device():
            passed_over("it is a host plugin")
        from trtllm_core.testing.gpu import sync_errors

        life = self.life(0, device=device)
        self.ask_all(life)  # once before: what is compiled or loaded at the first call may wait
        life.rig.watch = sync_errors
        self.ask_all(life)
        life.rig.commit({slot: life.tokens(1) for slot in life.rig.branches})
        life.rig.fork([(0, 1), (1, 0)])

    @cuda
    def test_gpu_graphs(self) -> None:
        """What declares ``graph_safe`` is captured once and replayed as the texts go on, with the same answers."""
        device = need_gpu()
        if not self.subject().make().capabilities.graph_safe or not self.on_device():
            passed_over("it does not declare graph_safe")
        from trtllm_core.testing.gpu import GraphedCommits, captured

        eager, life = self.life(1, device=device), self.life(1, device=device)
        slots = list(life.rig.branches)
        plain, again = self.question(eager.rig, slots), self.question(life.rig, slots)
        graph, answer = captured(again, warm=True)
        commits = GraphedCommits(life.rig, slots)
        for step in range(5):
            graph.replay()
            due = plain()
            same = torch.allclose(answer.float(), due.float(), rtol=1e-4, atol=1e-4)
            require(same, f"replayed from a CUDA graph, it answers differently after {step} steps")
            new = {slot: eager.tokens(1) for slot in slots}
            eager.rig.commit(new)
            commits.commit(new)

    def question(self, rig: G, slots: Sequence[int]) -> Callable[[], torch.Tensor]:
        """A call of the plugin on tensors that stay where they are; what it returns."""
        raise NotImplementedError


def _parting(one: Sequence[Operation], two: Sequence[Operation]) -> str:
    """Where two lists of operations first differ."""
    at, pair = next((i, pair) for i, pair in enumerate(itertools.zip_longest(one, two)) if pair[0] != pair[1])
    first, second = (
        "nothing" if each is None else f"{each[0]} on {[list(shape) for shape, _ in each[1]]}" for each in pair
    )
    return f"different operations: number {at} was {first}, and then {second}"
