"""Graphs of tiny models, and TensorRT-RTX's parser, which needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from trtllm_core.backends.linear.context import AttentionKind
from trtllm_core.backends.linear.export import GraphOptions
from trtllm_core.backends.linear.writing import write_weights_and_graph
from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.engine.build import plan_engine
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(max_batch_size=4, max_input_len=48, max_seq_len=64, max_num_tokens=192)


@dataclass(frozen=True)
class Graph:
    """An exported model on disk."""

    config: EngineConfig
    kind: AttentionKind
    proto: Any
    path: Path


MakeGraph = Callable[..., Graph]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA."""
    return write_llama(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def make_graph(tmp_path_factory: pytest.TempPathFactory) -> MakeGraph:
    """``make_graph(kind, dtype, checkpoint, ...)``: made once each; without a checkpoint of a tiny LLaMA."""
    plugins, made = Plugins.load(), {}

    def make(
        kind: AttentionKind = "lower_right", dtype: str = "float16", checkpoint: Path | None = None, **form_options: Any
    ) -> Graph:
        key = (kind, dtype, checkpoint, *form_options.items())
        if key not in made:
            directory = tmp_path_factory.mktemp("graph")
            source = open_checkpoint(checkpoint or write_llama(directory / "hf"))
            config, family, _ = plan_engine(source, LIMITS.replace(dtype=dtype, backend="tensorrt"), plugins)
            weights = check_weight_map(family, config.model, source)
            parts = rank_weights(weights, config.model, source, TensorParallel())
            file, form = directory / "rank0.safetensors", GraphOptions("tensorrt", kind, **form_options)
            path, found = write_weights_and_graph(config, family, parts, file, form)
            proto = onnx.load(path, load_external_data=False)
            made[key] = Graph(config, found, proto, path)
        return made[key]

    return make


@pytest.fixture(scope="session")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


class Parsed:
    """A network, and what must live as long as it does."""

    def __init__(self, trt: Any, path: Path) -> None:
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.parses = self.parser.parse_from_file(str(path))
