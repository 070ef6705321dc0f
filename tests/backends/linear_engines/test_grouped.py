"""ONNX Runtime's fused operators: what an engine is made of, and that they compute what the plain ones do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from trtllm_core import Plugins, Session, build_engine
from trtllm_core.backends.linear.context import LinearModule, kind_for
from trtllm_core.backends.linear.export import GraphOptions, export_module
from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable
from trtllm_core.errors import ConfigError
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin.kv_policy import KVModel, KVPlan
from trtllm_core.testing.reference import ReferenceModel

from .conftest import LIMITS
from .test_build import SMALL

S = 32


class OneLayer(nn.Module):
    """A table, one attention layer with 4 heads over 2, and its output as logits."""

    def __init__(self, size: int, **features: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 8 * size), requires_grad=False)
        self.attention = Attention(0, 4, 2, size, **features)
        if self.attention.rotary is not None:
            self.attention.rotary.prepare(S, torch.device("cpu"), torch.float32)

    def forward(self, input_ids: torch.Tensor, context: Any) -> torch.Tensor:
        qkv = torch.nn.functional.embedding(input_ids, self.table)
        return self.attention(qkv.unflatten(-1, (8, -1)), context)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"size": 16},
    "rotated": {"size": 16, "rotary": RotaryEmbedding(16, 1e4, 64)},
    "partly rotated": {"size": 32, "rotary": RotaryEmbedding(16, 1e4, 64)},
    "a window": {"size": 24, "sliding_window": 3},
    "a cap and a scale": {"size": 8, "softcap": 2.0, "scale": 0.7},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_the_fused_operator_computes_what_masked_attention_does(features: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = OneLayer(**features)
    size = module.attention.head_size
    assert kind_for(module, "grouped") == "grouped"
    config: Any = SimpleNamespace(
        model=SimpleNamespace(num_layers=1, num_kv_heads=2, head_size=size, dtype="float32"),
        build=SimpleNamespace(max_seq_len=S),
        quantization=None,
    )
    proto = export_module(module, config, GraphOptions("onnxruntime", "grouped"), tmp_path / "none", {})
    assert "cache_entries" not in {one.name for one in proto.graph.input}
    graph = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for write, tokens in (([0, 0], 5), ([7, 2], 1), ([6], 4)):
        ids = torch.randint(50, (len(write), tokens))
        indices = torch.arange(tokens).expand(len(write), -1).contiguous()
        caches = [torch.randn(len(write), 2, S, size) for _ in range(2)]
        feed = {"input_ids": ids, "write_indices": torch.tensor(write), "logit_indices": indices}
        named = {**feed, "past_key_0": caches[0], "past_value_0": caches[1]}
        ours = graph.run(None, {name: tensor.numpy() for name, tensor in named.items()})
        for kind in ("mask", "grouped"):
            theirs = LinearModule(module, kind)(**feed, past=list(caches))  # type: ignore[arg-type]
            assert (torch.from_numpy(ours[0]) - theirs[0]).abs().max() < 1e-5
            for cache, other in zip(ours[1:], theirs[1:], strict=True):
                for row, past in enumerate(write):  # the others are nobody's yet
                    seen = slice(past + tokens)
                    assert (torch.from_numpy(cache)[row, :, seen] - other[row, :, seen]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "features",
    [
        {"size": 16, "alibi": Alibi(4, TensorParallel())},
        {"size": 12},
        {"size": 16, "rotary": RotaryEmbedding(8, 1e4, 64)},
    ],
    ids=["biases of distance", "a head of 12", "8 rotated elements"],
)
def test_what_the_operator_does_not_take_has_a_mask(features: dict[str, Any]) -> None:
    assert kind_for(OneLayer(**features), "grouped") == "mask"


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", "float16"), ("llama", "float32"), ("bloom", "float16"), ("mistral", "float16")]
)
def test_every_family_on_onnx_runtime(family: str, dtype: Any, tmp_path: Path, plugins: Plugins) -> None:
    window = transformers.MistralConfig(**{**SMALL["llama"].to_dict(), "sliding_window": 6, "model_type": "mistral"})
    model = ReferenceModel({**SMALL, "mistral": window}[family], tmp_path, plugins, gain=0.8)
    build = LIMITS.replace(dtype=dtype, backend="onnxruntime", options={"verify": True})
    record = build_engine(model.path, tmp_path / "engine", build, plugins=plugins).record
    found = record["verified"]
    assert found["largest_error"] < (1e-5 if dtype == "float32" else 5e-3) * found["largest_logit"]
    nodes = onnx.load(tmp_path / "engine" / "rank0.onnx", load_external_data=False).graph.node
    count = Counter(node.op_type for node in nodes)
    if family == "bloom":
        assert (record["attention"], count["Attention"], count["GroupQueryAttention"]) == ("mask", 2, 0)
    else:
        assert (record["attention"], count["Attention"], count["GroupQueryAttention"]) == ("grouped", 0, 2)
    if family in ("llama", "mistral"):  # all but the first norm follow a sum
        assert (count["SkipSimplifiedLayerNormalization"], count["RMSNormalization"]) == (4, 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    place = tmp_path_factory.mktemp("grouped")
    model = ReferenceModel(SMALL["llama"], place, plugins, gain=0.8)
    build = LIMITS.replace(dtype="float32", backend="onnxruntime")
    build_engine(model.path, place / "engine", build, plugins=plugins)
    return place / "engine"


def test_drafts_of_several_rows_run_one_by_one(directory: Path, plugins: Plugins) -> None:
    """The operator takes several tokens of several rows only where their caches are empty."""
    session = Session.from_directory(directory, plugins=plugins)
    engine: Any = session._executable
    assert isinstance(engine, OnnxRuntimeExecutable)
    model = session.config.model
    kv = KVModel(model.num_layers, model.num_kv_heads, model.head_size, "float32", 0)
    engine.allocate_kv(KVPlan(3, 64, 1, kv))
    random = torch.Generator().manual_seed(2)
    prompts, drafts = (torch.randint(67, (3, n), generator=random) for n in (6, 4))
    runs = []
    run = engine._run
    engine._run = lambda inputs, *others: (runs.append(tuple(inputs["input_ids"].shape)), run(inputs, *others))[1]

    def step(ids: torch.Tensor, write: list[int], first: int) -> torch.Tensor:
        rows, tokens = ids.shape
        index = torch.arange(tokens).expand(rows, -1).contiguous()
        logits = torch.empty(rows, tokens, 67)
        inputs = {"input_ids": ids, "write_indices": torch.tensor(write), "logit_indices": index}
        session.run({**inputs, "cache_rows": torch.arange(first, first + rows)}, {"logits": logits})
        return logits

    step(prompts, [0, 0, 0], 0)
    together = step(drafts, [6, 4, 5], 0)
    assert runs == [(3, 6), (1, 4), (1, 4), (1, 4)]
    alone = [step(drafts[row : row + 1], [past], row) for row, past in enumerate((6, 4, 5))]
    assert torch.equal(together, torch.cat(alone))


def test_another_device_than_the_cpu_is_refused(directory: Path, plugins: Plugins) -> None:
    assert Session.from_directory(directory, plugins=plugins, device="cpu").device.type == "cpu"
    with pytest.raises(ConfigError, match="onnxruntime engines run on the CPU, not on 'cuda'"):
        Session.from_directory(directory, plugins=plugins, device="cuda")


def test_a_second_cache_is_bound_anew(directory: Path, plugins: Plugins) -> None:
    """Its address may be that of the first one, and its layers lie elsewhere."""
    session = Session.from_directory(directory, plugins=plugins)
    engine: Any = session._executable
    model = session.config.model
    kv = KVModel(model.num_layers, model.num_kv_heads, model.head_size, "float32", 0)
    ids, logits = torch.tensor([[5], [7]]), torch.empty(2, 1, 67)
    inputs = {"input_ids": ids, "write_indices": torch.tensor([0, 0]), "logit_indices": torch.zeros_like(ids)}
    bound = []
    for slots in (4, 3):
        engine.allocate_kv(KVPlan(slots, 64, 1, kv))
        session.run({**inputs, "cache_rows": torch.arange(2)}, {"logits": logits})
        bound.append(engine._binding)
        written = engine._caches[:, :2, :, 0].abs().sum((1, 2, 3))
        assert (written > 0).all(), "all layers write where their caches are"
    assert bound[0] is not bound[1]
