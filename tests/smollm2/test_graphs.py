"""A real model on the padded, linear contract: ONNX Runtime's tokens, and TensorRT engines of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2"), pytest.mark.timeout(600)]

GREEDY = SamplingConfig(max_new_tokens=64, end_id=(), min_length=0, return_dict=True)


def built(gguf: Path, directory: Path, plugins: Plugins, **fields: Any) -> dict[str, Any]:
    return build_engine(gguf, directory, BuildConfig(max_seq_len=512, **fields), plugins=plugins).record


def test_onnx_runtime_s_tokens_equal_transformers(
    smollm2_gguf: Path, tmp_path: Path, plugins: Plugins, prompts: Any, expected: Any
) -> None:
    built(smollm2_gguf, tmp_path / "engine", plugins, dtype="float32", backend="onnxruntime")
    with ModelRunner.from_dir(tmp_path / "engine", plugins=plugins) as runner:
        assert [output.tokens for output in runner.generate(prompts, GREEDY)["outputs"]] == expected


def test_onnx_runtime_s_half_precision(
    smollm2_gguf: Path, tmp_path: Path, plugins: Plugins, prompts: Any, peer: Any
) -> None:
    """Logits of the first token of each answer."""
    built(smollm2_gguf, tmp_path / "engine", plugins, dtype="float16", backend="onnxruntime")
    seen: list[torch.Tensor] = []
    with ModelRunner.from_dir(tmp_path / "engine", plugins=plugins) as runner:
        loop, run = runner.generation.loop, runner.generation.loop.engine.run

        def recorded(inputs: Any, outputs: Any) -> None:
            run(inputs, outputs)
            seen.append(outputs["logits"].clone())

        loop.engine.run = recorded  # type: ignore[method-assign,assignment]
        for prompt in prompts:
            runner.generate([prompt], GREEDY.replace(max_new_tokens=1))
    with torch.inference_mode():
        theirs = torch.stack([peer(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert (torch.cat(seen) - theirs).abs().max() < 5e-3 * theirs.abs().max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensorrt_engines(dtype: str, smollm2_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = {"verify": dtype == "float16"}
    record = built(smollm2_gguf, tmp_path / "engine", plugins, dtype=dtype, backend="tensorrt", options=options)
    assert record["attention"] == "lower_right"
    assert (tmp_path / "engine" / "rank0.engine").stat().st_size > 250e6
    if dtype == "float16":
        assert record["verified"]["largest_error"] < 5e-3 * record["verified"]["largest_logit"]
