"""The command line with LoRA adapters, prompt tables and gathered logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from trtllm_core import ModelRunner
from trtllm_core.cli.app import app
from trtllm_core.engine.directory import read_config
from trtllm_core.testing.checkpoints import write_lora

OPTIONS = (
    *("--max-seq-len", "128", "--max-input-len", "96", "--tokens-per-block", "16", "--max-batch-size", "4"),
    *("--max-lora-rank", "8", "--max-loras", "3", "--max-prompt-embedding-table-size", "12", "--gather-context-logits"),
    *("--lora-target-modules", "q_proj", "--lora-target-modules", "mlp_4h_to_h"),
)
NEW = ("--max-new-tokens", "8", "--json", "--no-chat", "--set", "end_id=[]")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "engine"
    result = CliRunner().invoke(app, ["build", str(tiny_checkpoint), "-o", str(path), *OPTIONS])
    assert result.exit_code == 0, result.output
    assert "LoRA adapters" in result.output
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lora")
    layers = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in (0, 1)}
    more = {f"model.layers.{i}.mlp.down_proj": (128, 64) for i in (0, 1)}
    return [write_lora(folder / "a", layers, seed=1), write_lora(folder / "b", {**layers, **more}, rank=8, seed=2)]


def tokens(result: Any) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in result.stdout.splitlines()]


def test_build_records_it(engine: Path, tiny_checkpoint: Path, cli: Any) -> None:
    build = read_config(engine).build
    assert (build.max_lora_rank, build.max_loras, build.max_prompt_embedding_table_size) == (8, 3, 12)
    assert build.lora_target_modules == ("q_proj", "mlp_4h_to_h")
    assert (build.gather_context_logits, build.gather_generation_logits) == (True, False)
    assert "up to date" in cli("build", tiny_checkpoint, "-o", engine, *OPTIONS).stdout
    plan = json.loads(cli("plan", engine, "--json").stdout)
    assert plan["lora"] == 3 * 16 * 2 * 4 * ((3 * 64 + 128) + (64 + 64) + (2 * 64 + 256) + (128 + 64))
    assert plan["total"] >= plan["lora"] + plan["weights"]


def test_adapters_by_prompt(engine: Path, adapters: list[Path], cli: Any) -> None:
    directories = [option for path in adapters for option in ("--lora-dir", path)]
    with ModelRunner.from_dir(engine, lora_dir=adapters) as runner:
        assert runner.tokenizer is not None
        ids = [runner.tokenizer.encode(text) for text in ("one", "two", "three")]
        config = {"end_id": (), "max_new_tokens": 8, "return_dict": True}
        expected = [list(o.tokens) for o in runner.generate(ids, lora_uids=["1", "-1", "0"], **config)["outputs"]]
        plain = [list(o.tokens) for o in runner.generate(ids, **config)["outputs"]]
    chosen = ("--lora-uid", "1", "--lora-uid", "-1", "--lora-uid", "0")
    assert tokens(cli("run", engine, "one", "two", "three", *NEW, *directories, *chosen)) == expected
    assert expected != plain
    assert tokens(cli("run", engine, "one", "two", "three", *NEW, *directories, "--lora-uid", "-1")) == plain
    assert tokens(cli("run", engine, "one", *NEW, "--lora-dir", adapters[1])) == expected[:1], "the one that is there"
    streamed = cli("run", engine, "one", *NEW[:2], *NEW[3:], "--stream", "--lora-dir", adapters[1]).stdout
    assert streamed == cli("run", engine, "one", *NEW[:2], *NEW[3:], "--lora-dir", adapters[1]).stdout


def test_prompt_tables(engine: Path, tmp_path: Path, cli: Any) -> None:
    table = np.random.default_rng(1).standard_normal((3, 4, 64)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    with ModelRunner.from_dir(engine) as runner:
        assert runner.tokenizer is not None
        texts = [runner.tokenizer.encode(text) for text in ("one", "two")]
        config = {"end_id": (), "max_new_tokens": 8, "return_dict": True, "prompt_table": table}

        def ask(count: int, tasks: str | None) -> list[list[int]]:
            ids = [[*range(256, 256 + count), *text] for text in texts]
            return [list(output.tokens) for output in runner.generate(ids, prompt_tasks=tasks, **config)["outputs"]]

        whole, part = ask(4, "2,0"), ask(2, None)
    given = ("--prompt-table", tmp_path / "table.npy")
    assert tokens(cli("run", engine, "one", "two", *NEW, *given, "--prompt-tasks", "2,0")) == whole
    assert tokens(cli("run", engine, "one", "two", *NEW, *given, "--num-prepend-vtokens", 2)) == part
    assert whole != part


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora-uid", "0"], "there is no adapter '0'"),
        (["--lora-dir", "{a}", "--lora-dir", "{b}"], "say with --lora-uid which one is meant"),
        (["--lora-dir", "{a}", "--lora-uid", "0", "--lora-uid", "0"], "--lora-uid is there 2 times for 1 prompts"),
        (["--lora-dir", "nowhere"], "holds no adapter"),
        (["--prompt-tasks", "0"], "there is no prompt_table"),
        (["--num-prepend-vtokens", "2"], "there is none"),
        (["--prompt-table", "nowhere.npy"], "cannot be read as a .npy file"),
    ],
)
def test_refusals(options: list[str], words: str, engine: Path, adapters: list[Path], cli: Any) -> None:
    filled = [option.format(a=adapters[0], b=adapters[1]) for option in options]
    shown = cli("run", engine, "one", *filled, status=2).output
    assert words in " ".join(shown.split())
