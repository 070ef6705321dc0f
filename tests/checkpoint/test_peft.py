"""Reading adapters: scalings as peft has them, and a sentence for all that is not honoured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_core.checkpoint.peft import CONFIG, WEIGHTS, read_peft
from trtllm_core.errors import CheckpointError

MODULE = "model.layers.{}.self_attn.{}_proj"


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter of rank 2 on q and v of two layers of 8 features."""
    path.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": ["q_proj"], **changes}
    (path / CONFIG).write_text(json.dumps(config))
    names = [MODULE.format(layer, part) for layer in (0, 1) for part in "qv"]
    sides = {f"base_model.model.{name}.lora_{side}.weight": side for name in names for side in "AB"}
    shapes = {"A": (2, 8), "B": (8, 2)}
    made = {name: torch.randn(shapes[side]) for name, side in sides.items()}
    save_file({**made, **(tensors or {})}, path / WEIGHTS)
    return path


def test_pairs_by_layer(tmp_path: Path) -> None:
    adapter = read_peft(write(tmp_path / "it"))
    assert sorted(adapter.pairs) == [MODULE.format(layer, part) for layer in (0, 1) for part in "qv"]
    assert adapter.rank == 2
    stored = load_file(tmp_path / "it" / WEIGHTS)
    pair = adapter.pairs[MODULE.format(1, "v")]
    assert torch.equal(pair.a, stored[f"base_model.model.{MODULE.format(1, 'v')}.lora_A.weight"])
    assert torch.equal(pair.b, stored[f"base_model.model.{MODULE.format(1, 'v')}.lora_B.weight"])
    assert pair.scaling == 3


def test_scalings_are_those_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    modules = {"layers": torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}) for _ in range(3))}
    for number, fields in enumerate(
        (
            {},
            {"use_rslora": True},
            {"rank_pattern": {"layers.1.q": 3}, "alpha_pattern": {"q": 5}},
            {"rank_pattern": {r"layers\.[12]\.q": 4, "q": 1}, "use_rslora": True},
            {"alpha_pattern": {"2.q": 1, "1.q": 7}, "init_lora_weights": "gaussian"},
        )
    ):
        model = torch.nn.ModuleDict(modules)
        config = peft.LoraConfig(r=2, lora_alpha=9, target_modules=["q"], **fields)
        adapted = peft.PeftModel(model, config)
        adapted.save_pretrained(tmp_path / str(number))
        ours = {name: (pair.a.shape[0], pair.scaling) for name, pair in read_peft(tmp_path / str(number)).pairs.items()}
        theirs = {
            name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
            for name, layer in adapted.named_modules()
            if hasattr(layer, "lora_A")
        }
        assert ours == pytest.approx(theirs)
        adapted.unload()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA': only LORA"),
        ({"use_dora": True}, r"use_dora=True: .*DoRA.*not supported"),
        ({"bias": "lora_only"}, "bias='lora_only': biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: whole layers"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_telepathy": True}, "use_telepathy=True: something that this version does not know"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the model's own weights"),
        ({"r": 4}, r"factors \[2, 8\] and \[8, 2\], where adapter_config.json says rank 4"),
        ({"rank_pattern": {"v_proj": 3}}, r"'model.layers.0.self_attn.v_proj' has factors .* rank 3"),
        ({"lora_alpha": None}, "lora_alpha=None, which is no number"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern=.*, which maps no patterns"),
        ({"alpha_pattern": ["v_proj"]}, r"alpha_pattern=\['v_proj'\], which maps no patterns"),
    ],
)
def test_what_is_not_honoured(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_peft(write(tmp_path / "it", **changes))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 8)}, "no low-rank factor of a linear"),
        ({"base_model.model.lm_head.weight": torch.zeros(8, 8)}, "'base_model.model.lm_head.weight', which is no"),
        ({"base_model.model.x.lora_A.weight": torch.zeros(2, 8)}, "'x' has lora_A and not the other factor"),
        ({f"base_model.model.{MODULE.format(0, 'q')}.lora_A.weight": torch.zeros(1, 8)}, "rank 2"),
        ({f"base_model.model.{MODULE.format(0, 'q')}.lora_A.weight": torch.zeros(2, 8, 3, 3)}, "are not matrices"),
        ({f"base_model.model.{MODULE.format(0, 'q')}.lora_B.weight": torch.full((8, 2), torch.nan)}, "not finite"),
        ({f"base_model.model.{MODULE.format(0, 'q')}.lora_A.weight": torch.ones(2, 8).int()}, "not floating-point"),
    ],
)
def test_tensors_that_are_no_adapter(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_peft(write(tmp_path / "it", tensors))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter: adapter_config.json is not there"):
        read_peft(tmp_path)
    path = write(tmp_path / "it")
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_peft(path)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing: save the adapter .* as safetensors"):
        read_peft(path)
    save_file({}, path / WEIGHTS)
    with pytest.raises(CheckpointError, match="is empty"):
        read_peft(path)
