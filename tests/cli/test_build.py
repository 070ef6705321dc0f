"""``build``: what it makes, when it makes it again, and what it never removes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.checkpoint.fingerprint import fingerprint
from trtllm_core.cli.options import BuildOptions

LIMITS = ("--max-seq-len", "64", "--tokens-per-block", "16")


@pytest.fixture
def engine(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    cli("build", tiny_checkpoint, "-o", path, *LIMITS)
    return path


def stamp(engine: Path) -> int:
    return (engine / "config.json").stat().st_mtime_ns


def test_it_prints_a_plan_and_one_line_at_the_end(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "engine"
    result = cli("build", tiny_checkpoint, "--output", path, *LIMITS)
    lines = result.stdout.splitlines()
    assert "weights" in lines[0]
    assert any("KV at limits" in line and "8 sequences" in line for line in lines)
    assert lines[-1].startswith(f"{path}: llama float32 for torch, ")
    assert lines[-1].endswith(" s")
    assert "rank 0" in result.stderr
    assert "15/15" in result.stderr
    assert (path / "rank0.safetensors").is_file()


def test_every_option_reaches_the_engine(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = {
        "dtype": "bfloat16",
        "backend": "torch",
        "max_batch_size": 3,
        "max_input_len": 20,
        "max_seq_len": 40,
        "max_num_tokens": 50,
        "tokens_per_block": 8,
        "tp_size": 2,
    }
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    cli("build", tiny_checkpoint, "-o", tmp_path / "e", *flags)
    build = json.loads((tmp_path / "e" / "config.json").read_text())["build"]
    assert {name: build[name] for name in options} == options
    assert (tmp_path / "e" / "rank1.safetensors").is_file()


def test_options_of_a_backend(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--backend", "onnxruntime", "--verify")
    cli("build", tiny_checkpoint, "-o", tmp_path / "e", "--dtype", "float32", *options)
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["build"]["options"] == {"verify": True}
    assert config["record"]["verified"]["largest_error"] < 1e-3
    again = cli("build", tiny_checkpoint, "-o", tmp_path / "e", "--dtype", "float32", *options)
    assert "up to date" in again.stdout
    said = "--option fast: write it as NAME=VALUE, such as --option attention=mask"
    assert said in cli("build", tiny_checkpoint, "-o", tmp_path / "f", "--option", "fast", status=2).stderr
    wrong = cli("build", tiny_checkpoint, "-o", tmp_path / "f", "--option", "attention=mask", status=2)
    assert "the torch backend has no build option 'attention'" in wrong.stderr


def test_which_module_builds_it(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(backend="tensorrt", backend_module="tensorrt_rtx", option=["attention=mask"])
    assert options.config().options == {"module": "tensorrt_rtx", "attention": "mask"}
    wrong = cli("build", tiny_checkpoint, "-o", tmp_path / "e", "--backend-module", "tensorrt", status=2)
    assert "the torch backend has no build option 'module'" in wrong.stderr


def test_a_default_prompt_length_makes_room_for_a_short_sequence(engine: Path) -> None:
    assert json.loads((engine / "config.json").read_text())["build"]["max_input_len"] == 63


def test_the_same_engine_is_not_built_again(cli: Callable, tiny_checkpoint: Path, engine: Path) -> None:
    before = stamp(engine)
    assert "up to date" in cli("build", tiny_checkpoint, "-o", engine, *LIMITS).stdout
    assert stamp(engine) == before
    cli("build", tiny_checkpoint, "-o", engine, *LIMITS, "--force")
    assert stamp(engine) != before


def test_other_options_build_again_and_say_why(cli: Callable, tiny_checkpoint: Path, engine: Path) -> None:
    result = cli("build", tiny_checkpoint, "-o", engine, *LIMITS, "--max-batch-size", "2")
    assert "build.max_batch_size 8 → 2" in result.stderr
    assert "up to date" in cli("build", tiny_checkpoint, "-o", engine, *LIMITS, "--max-batch-size", "2").stdout


def test_another_core_builds_again(cli: Callable, tiny_checkpoint: Path, engine: Path) -> None:
    config = engine / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "core_version": "0.0.1"}))
    assert "core_version 0.0.1 → " in cli("build", tiny_checkpoint, "-o", engine, *LIMITS).stderr


def test_other_weights_of_the_same_name_build_again(cli: Callable, engine: Path, make_checkpoint: Callable) -> None:
    other = make_checkpoint("tiny", seed=1)
    assert "the files of tiny are others" in cli("build", other, "-o", engine, *LIMITS).stderr


def test_a_damaged_engine_is_built_again(cli: Callable, tiny_checkpoint: Path, engine: Path) -> None:
    rank = engine / "rank0.safetensors"
    rank.write_bytes(rank.read_bytes()[:-10])
    assert "truncated" in cli("build", tiny_checkpoint, "-o", engine, *LIMITS).stderr
    assert "up to date" in cli("build", tiny_checkpoint, "-o", engine, *LIMITS).stdout


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_nothing_but_an_engine_is_ever_replaced(
    force: list[str], cli: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious.txt").write_text("x")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    for place in (home, home / "precious.txt", copy):
        assert "no engine" in cli("build", tiny_checkpoint, "-o", place, *force, status=2).stderr
    assert "holds the checkpoint" in cli("build", copy, "-o", copy, *force, status=2).stderr
    assert "holds the checkpoint" in cli("build", copy, "-o", tmp_path, *force, status=2).stderr
    assert (home / "precious.txt").read_text() == "x"
    assert (copy / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int3"], "'float32', 'bfloat16' or 'float16'"),
        (["--max-seq-len", "100000"], "256 positions"),
        (["--max-input-len", "50", "--max-seq-len", "50"], "must be below max_seq_len"),
        (["--backend", "nvfuser"], "pip install trtllm-plugin-nvfuser"),
    ],
)
def test_refusals(options: list[str], message: str, cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert message in cli("build", tiny_checkpoint, "-o", tmp_path / "e", *options, status=2).stderr
    assert not (tmp_path / "e").exists()


def test_a_checkpoint_that_is_not_there(cli: Callable, tmp_path: Path) -> None:
    error = cli("build", tmp_path / "none", "-o", tmp_path / "e", status=2).stderr
    assert "give a Hugging Face directory or a GGUF file" in error


def test_a_family_that_is_not_installed_names_the_pip_command(
    cli: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "bloom"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    error = cli("build", copy, "-o", tmp_path / "e", status=2).stderr
    assert "pip install trtllm-plugin-nosuch" in error


def test_a_fingerprint_sees_any_change_of_a_small_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, copy)
    assert fingerprint(copy) == fingerprint(tiny_checkpoint)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert fingerprint(copy) != fingerprint(tiny_checkpoint)
    (copy / "model.safetensors").unlink()
    (copy / "one.gguf").write_bytes(content)
    assert fingerprint(copy / "one.gguf") != fingerprint(copy)


def test_what_quantised_weights_cost(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A text that the user gives. " * 4)
    arguments = ("build", tiny_checkpoint, "-o", tmp_path / "e", "--quant", "int8", "--quant-text", text)
    first, again = cli(*arguments).stdout, cli(*arguments).stdout
    assert "llama float32 int8 for torch" in first
    assert "up to date" in again
    for told in (first, again):
        found = re.search(r"over (\d+) tokens .* perplexity ([\d.]+) \(([\d.]+) without\).*off by ([\d.]+)", told)
        assert found
        assert int(found[1]) >= len(text.read_text()) - 1
        assert float(found[2]) == pytest.approx(float(found[3]), rel=0.02)
        assert float(found[4]) < 0.05
        rounded = re.search(r"perplexity ([\d.]+) with activations in int8 too.* moves logits by ([\d.]+)", told)
        if rounded:  # the machine multiplies bytes
            assert float(rounded[1]) == pytest.approx(float(found[2]), rel=0.02)
            assert float(rounded[2]) < 0.05
    assert "is built again: build.quantization" in cli(*arguments[:4], "--quant", "int4").stderr
    told = cli(*arguments[:4], "--quant", "fp8", "--quant-text", text).stdout
    assert re.search(r"perplexity ([\d.]+) \(\S+ without\).*; perplexity ([\d.]+) with activations in fp8 too", told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant", "int3"], "'int4', 'int8', 'fp8' or 'keep'"),
        (["--quant-group", "64"], "needs --quant"),
        (["--quant-text", "README.md"], "name a quantisation too"),
        (["--quant", "int8", "--quant-text", "no-such-file"], "cannot be read as text"),
        (["--quant", "keep"], "not quantised"),
        (["--quant", "int4", "--max-lora-rank", "4"], "adapters need weights"),
    ],
)
def test_refused_quantisation(
    options: list[str], message: str, cli: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert message in cli("build", tiny_checkpoint, "-o", tmp_path / "e", *options, status=2).stderr
    assert not (tmp_path / "e").exists()
