"""A rank's weights and graph, side by side on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trtllm_core.backends.linear.context import AttentionKind, kind_for
from trtllm_core.backends.linear.export import GraphOptions, export_module, write_graph
from trtllm_core.backends.modules import fill, meta_module, parameter_dtypes, parameter_shapes
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import Weights, places, write_weights
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import ModelFamily


def write_weights_and_graph(
    config: EngineConfig,
    family: ModelFamily,
    weights: Iterable[tuple[str, torch.Tensor]],
    file: Path,
    options: GraphOptions,
    check: Callable[[nn.Module], None] = lambda module: None,
) -> tuple[Path, AttentionKind]:
    """Write ``file`` (safetensors) and, beside it, the ONNX graph whose weights it holds.

    Args:
        config: of the engine.
        family: of the model.
        weights: its parameters, see ``Backend.build``.
        file: where they go.
        options: of the graph. Its attention is a wish: see ``kind_for``.
        check: called with the module before anything is written, to refuse it.

    Returns:
        The graph's path, and the kind of attention that it has.

    Raises:
        CheckpointError: the weights do not make up the family's module.
    """
    device = torch.device("cpu")
    module = meta_module(config, family, TensorParallel())
    check(module)
    write_weights(file, parameter_shapes(module), parameter_dtypes(module), weights, {})
    fill(module, config, Weights(file, device).tensors, device)
    kind = kind_for(module, options.attention)
    path = file.with_suffix(".onnx")
    write_graph(export_module(module, config, replace(options, attention=kind), file, places(file)), path)
    return path, kind
