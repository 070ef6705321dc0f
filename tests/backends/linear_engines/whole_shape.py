"""A published shape as a TensorRT engine with its weights as inputs: time and memory of export and build.

``python tests/backends/linear_engines/whole_shape.py llama-3-8b [LAYERS]`` prints them as JSON. The weights are a
sparse file: as long as real ones, and mapped as they are, without filling a disk. Needs no GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx  # noqa: F401 - so that importing it is no part of what is measured
import onnxscript  # noqa: F401
import tensorrt_rtx
import torch

from trtllm_core.backends.linear.context import kind_for
from trtllm_core.backends.linear.export import GraphOptions, export_module, write_graph
from trtllm_core.backends.modules import fill, meta_module, parameter_shapes
from trtllm_core.backends.tensorrt.build import build_plan
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.cli.bench.shapes import SHAPES, ShapeCheckpoint
from trtllm_core.cli.bench.timing import peak_memory
from trtllm_core.config import BuildConfig
from trtllm_core.engine import weights as stored
from trtllm_core.engine.build import plan_engine
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins

OPTIONS = TensorRTOptions(module="tensorrt_rtx", weights="inputs")


def measure(name: str, layers: int, directory: Path) -> dict[str, Any]:
    """Export and build."""
    plugins = Plugins.load()
    checkpoint = ShapeCheckpoint(name, {**SHAPES[name], "num_hidden_layers": layers})
    build = BuildConfig(backend="tensorrt", max_batch_size=8, max_input_len=2048, max_seq_len=4096)
    config, family, _ = plan_engine(checkpoint, build.replace(options=OPTIONS.model_dump(exclude_unset=True)), plugins)
    module, file = meta_module(config, family, TensorParallel()), directory / "rank0.safetensors"
    write_sparse(file, parameter_shapes(module), getattr(torch, config.model.dtype))
    before, started = peak_memory(), time.perf_counter()
    tensors = stored.Weights(file, torch.device("cpu")).tensors
    fill(module, config, tensors, torch.device("cpu"))
    form = GraphOptions("tensorrt", kind_for(module, OPTIONS.attention), weights_as_inputs=True)
    path = directory / "rank0.onnx"
    write_graph(export_module(module, config, form, file, stored.places(file)), path)
    exported, export_peak = time.perf_counter(), peak_memory()
    plan, counts = build_plan(tensorrt_rtx, path, config, OPTIONS, form.attention)
    return {
        "shape": name,
        "layers": layers,
        "weights_bytes": file.stat().st_size,
        "export_s": exported - started,
        "export_bytes": export_peak - before,
        "build_s": time.perf_counter() - exported,
        "peak_bytes": peak_memory(),
        "plan_bytes": plan.nbytes,
        "attentions": counts["ATTENTION_INPUT"],
    }


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file of zeros of which nothing lies on disk but the header."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + offset)


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else "llama-3-8b"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else int(SHAPES[asked]["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measure(asked, count, Path(place))))
