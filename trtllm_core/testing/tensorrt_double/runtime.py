"""``Runtime``: from what stands for a serialised engine to an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_core.testing.tensorrt_double.engine import Engine
from trtllm_core.testing.tensorrt_double.types import Bounds, EngineInvalidityDiagnostics, EngineValidity

VERSION = "11.1.0"


class Logger:
    """Takes a severity, and logs nothing."""

    ERROR = 1
    WARNING = 2

    def __init__(self, severity: int = WARNING) -> None:
        self.severity = severity


def serialise(
    graph: Path, profiles: Sequence[Mapping[str, Bounds]], version: str = VERSION, streamable: int = 0
) -> bytes:
    """What stands for a serialised engine: where its graph is, its profiles, and bytes of weights to stream."""
    told = {"graph": str(graph), "profiles": list(profiles), "version": version, "streamable": streamable}
    return json.dumps(told).encode()


class Runtime:
    """Reads what ``serialise`` wrote."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def get_engine_validity(self, plan: Any) -> tuple[EngineValidity, int]:
        """Invalid where another version wrote it, or it is damaged."""
        try:
            version = json.loads(bytes(plan))["version"]
        except ValueError:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.MALFORMED_ENGINE
        if version != VERSION:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.VERSION_MISMATCH
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        """The engine; None where the bytes are none."""
        try:
            told = json.loads(bytes(plan))
        except ValueError:
            return None
        return Engine(Path(told["graph"]), told["profiles"], told["streamable"])
