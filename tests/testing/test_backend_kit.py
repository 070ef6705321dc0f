"""The conformance kit of backends: on our own, and on broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.plugin import Finding, Inspection
from trtllm_core.testing import BackendConformance


class TestTorch(BackendConformance):
    plugin = "torch"


class TestOnnxRuntime(BackendConformance):
    plugin = "onnxruntime"


class Complains(TorchBackend):
    def diagnose(self, path: Path, config: Any) -> list[Finding]:
        return [Finding("problem", "the moon", "it is in the wrong phase")]


class SaysNothing(TorchBackend):
    def inspect(self, path: Path, config: Any, family: Any) -> Inspection:
        return Inspection("")


class Hides(TorchBackend):
    gives = frozenset({"multi_position"})


def test_a_backend_that_says_less_than_its_engines_give_is_found() -> None:
    class Kit(BackendConformance):
        plugin = Hides

    with pytest.raises(
        AssertionError, match="give .'hidden_states', 'multi_position'., and it says that .* give .'multi"
    ):
        Kit().test_generation()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (Complains, "diagnose has something against a new engine: it is in the wrong phase"),
        (SaysNothing, "inspect does not say who tells it"),
    ],
)
def test_a_broken_backend_is_found(backend: type, message: str) -> None:
    class Kit(BackendConformance):
        plugin = backend

    with pytest.raises(AssertionError, match=message):
        Kit().test_inspection()
