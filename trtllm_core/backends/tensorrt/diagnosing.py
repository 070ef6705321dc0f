"""What could keep a TensorRT engine from running here, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trtllm_core.backends.tensorrt.library import load_library
from trtllm_core.backends.tensorrt.validity import validity_problem
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import map_file
from trtllm_core.errors import TrtllmCoreError
from trtllm_core.plugin import Finding

LEAST_CAPABILITY = (7, 5)
"""Of the GPUs that either module supports."""
REFUSED_CAPABILITIES = {"tensorrt_rtx": (9, 10)}
"""Majors of data-center GPUs, which a module does not run on."""


def diagnose(path: Path, config: EngineConfig) -> Iterator[Finding]:
    """Findings on the module, the GPU and the plan, in this order."""
    module, built = config.record.get("module", "tensorrt"), config.record.get("version")
    try:
        trt = load_library(module)
    except TrtllmCoreError as error:
        yield Finding("problem", module, f"{error} (the engine was built by {built})")
        return
    running = trt.__version__
    if built == running:
        yield Finding("ok", module, f"{running}, which built the engine")
    else:
        cure = f"pip install {module}=={built}, or build it again"
        yield Finding("problem", module, f"the engine was built by {built}, and {running} is installed: {cure}")
    if not torch.cuda.is_available():
        yield Finding("problem", "GPU", "there is none here: the engine can be built and checked, and not run")
        return
    yield _gpu(module, torch.cuda.get_device_capability(), config)
    yield _plan(trt, path)


def capability_problem(module: str, capability: tuple[int, int]) -> str | None:
    """Why a module does not run on GPUs of a compute capability; None where it may."""
    if capability < LEAST_CAPABILITY or capability[0] in REFUSED_CAPABILITIES.get(module, ()):
        other = "; build for the module tensorrt" if module == "tensorrt_rtx" and capability >= LEAST_CAPABILITY else ""
        return f"{module} does not support GPUs of compute capability {capability[0]}.{capability[1]}{other}"
    return None


def _gpu(module: str, capability: tuple[int, int], config: EngineConfig) -> Finding:
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    problem = capability_problem(module, capability)
    if problem is not None:
        return Finding("problem", "GPU", f"{name}: {problem}")
    targets = config.build.options.get("compute_capabilities") or ()
    if targets and f"{capability[0]}.{capability[1]}" not in targets:
        return Finding("problem", "GPU", f"{name}: the engine was built for {', '.join(targets)} alone; build it again")
    return Finding("ok", "GPU", name)


def _plan(trt: Any, path: Path) -> Finding:
    problem = validity_problem(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), map_file(path))
    if problem is not None:
        return Finding("problem", path.name, problem)
    asked = "get_engine_validity" if hasattr(trt.Runtime, "get_engine_validity") else "its size alone"
    return Finding("ok", path.name, f"nothing speaks against it, by {asked}")
