"""A script written for ``tensorrt_llm`` runs as it is, and gives what our own runner gives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, build_engine
from trtllm_core.compat import install, uninstall
from trtllm_core.compat.cuda import cuda_on_cpu
from trtllm_core.errors import ConfigError

SCRIPT = Path(__file__).parent / "scripts" / "run.py"
TEXTS = ["Hello", "My name is", "a, b, c, a, b"]
Run = Callable[..., list[list]]


@pytest.fixture
def ours(tiny: Path) -> Iterator[Callable[..., list]]:
    """``ours(field=…)``: the tokens that our own runner gives for each text, without the end token."""
    with ModelRunner.from_dir(tiny / "engine") as runner:

        def generate(stop: list[str] | None = None, **fields: object) -> list:
            config = SamplingConfig(max_new_tokens=12, end_id=255, return_dict=True).replace(**fields)
            words = [() if text is None else (tuple(letters(text)),) for text in stop or [None] * len(TEXTS)]
            configs = [config.replace(stop_words_list=word) if word else config for word in words]
            outputs = runner.generate([runner.tokenizer.encode(text) for text in TEXTS], configs)["outputs"]
            return [list(output.tokens)[: output.length - len(output.prompt)] for output in outputs]

        yield generate


@pytest.fixture
def arguments(tiny: Path) -> list[str]:
    directories = ["--engine_dir", str(tiny / "engine"), "--tokenizer_dir", str(tiny / "checkpoint")]
    return [*directories, "--input_text", *TEXTS]


@pytest.fixture
def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the script in this process; what it printed, by step: ``[request, beam, tokens, text]``."""

    def go(*options: str) -> list[list]:
        install()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *options])
        out = io.StringIO()
        with contextlib.redirect_stdout(out), cuda_on_cpu():
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return parsed(out.getvalue())

    yield go
    uninstall()


def parsed(text: str) -> list[list]:
    steps: list[list] = [[]]
    for line in text.splitlines():
        if line == "STEP":
            steps.append([])
        else:
            steps[-1].append(json.loads(line.removeprefix("OUTPUT ")))
    return [step for step in steps if step]


def tokens(step: list) -> list:
    return [item[2] for item in step]


def letters(text: str) -> list[int]:
    """Token ids of visible ASCII."""
    return [ord(letter) - ord("!") for letter in text]


def visible(tokens: list[int]) -> str:
    """The last token that a script can name as a stop word."""
    return next((chr(t + ord("!")) for t in reversed(tokens[2:]) if t < 94 and chr(t + ord("!")) not in ',"'), "q")


# -- in a process of its own -------------------------------------------------------------------------------------------


def shell(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtllm_core.compat", *map(str, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    )


def test_a_batch_with_stop_words_and_callbacks(arguments: list[str], ours: Callable, tmp_path: Path) -> None:
    banned = {"bad_words_list": tuple((token,) for token in letters("&{+"))}
    free = ours(**banned)
    assert free != ours(), "or the callback would not show"
    stop = [visible(tokens) for tokens in free]
    expected = ours(stop, **banned)
    assert any(map(lambda a, b: len(a) < len(b), expected[1:], free[1:])), "a stop word of a later row matches"
    words = [argument for word in stop for argument in ("--stop_words", word)]
    options = ("--use_py_session", "--ban_letters", "&{+", *words, "--output_npy", tmp_path / "ids.npy")
    done = shell(SCRIPT, *arguments, *options, "--run_profiling", "--log_level", "info")
    assert done.returncode == 0, done.stderr
    (step,) = parsed(done.stdout)
    assert tokens(step) == expected
    ids = np.load(tmp_path / "ids.npy")
    assert ids.dtype == np.int32
    assert ids.shape == (3, 1, max(map(len, TEXTS)) + 12)
    for row, text, new in zip(ids[:, 0], TEXTS, expected, strict=True):
        assert (row[len(text) + len(new) :] == 255).all(), "the end token fills what is after the end"
    assert "generate: " in done.stderr
    assert ("stays on the CPU" in done.stderr) is not torch.cuda.is_available()


@pytest.mark.slow
def test_ranks_share_an_engine(tiny: Path, tmp_path: Path) -> None:
    """Two ranks, as torchrun starts them: rank 0 prints what one rank alone prints. On the CPU, which two can share."""
    build = BuildConfig(max_batch_size=4, max_seq_len=128, max_input_len=96, tokens_per_block=16, tp_size=2)
    build_engine(str(tiny / "checkpoint"), tmp_path / "engine", build)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "trtllm_core.compat", SCRIPT, "--use_py_session", "--input_text", *TEXTS]
    command += ["--engine_dir", tmp_path / "engine", "--tokenizer_dir", tiny / "checkpoint", "--top_k", "3"]
    ranks = [
        subprocess.Popen(
            list(map(str, command)),
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    with ModelRunner.from_dir(tiny / "engine") as runner:
        config = SamplingConfig(max_new_tokens=12, end_id=255, top_k=3, random_seed=0, return_dict=True)
        expected = runner.generate([runner.tokenizer.encode(text) for text in TEXTS], config)["outputs"]
    assert tokens(parsed(outputs[0][0])[0]) == [list(one.tokens)[: one.length - len(one.prompt)] for one in expected]
    assert outputs[1][0] == ""


def test_what_the_command_refuses(tmp_path: Path) -> None:
    assert "usage: " in shell().stderr
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text("import tensorrt_llm.runtime")
    done = shell(tmp_path / "script.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: tensorrt_llm is there already (")
    assert str(tmp_path) in done.stderr


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", ["--use_py_session", "--max_output_len=12"])
def test_streaming_gives_the_whole_ids_after_each_step(run: Run, ours: Callable, session: str) -> None:
    steps = run("--streaming", session)
    expected = ours()
    assert tokens(steps[-1]) == expected
    for n, step in enumerate(steps, 1):
        assert tokens(step) == [new[:n] for new in expected]
    assert len(steps) == 12
    assert len(run("--streaming", session, "--streaming_interval", "5")) == 4


def test_stopping_criteria_end_the_batch(run: Run, ours: Callable) -> None:
    assert tokens(run("--stop_after", "4")[0]) == [new[:4] for new in ours()]


def test_sampling_is_repeatable_without_a_seed(run: Run, ours: Callable) -> None:
    options = ("--top_k", "0", "--top_p", "0.9", "--temperature", "1.5", "--repetition_penalty", "1.3")
    step = run(*options)[0]
    assert step == run(*options)[0]
    fields = {"top_k": 0, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.3, "random_seed": 0}
    assert tokens(step) == ours(**fields)
    assert tokens(step) != ours()


# -- the name ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def named() -> Iterator[None]:
    install()
    yield
    uninstall()


def test_submodules_are_ours_under_both_names(named: None) -> None:
    import tensorrt_llm
    import tensorrt_llm.runtime.generation
    from tensorrt_llm.logger import logger

    import trtllm_core.compat.tensorrt_llm.runtime as runtime

    assert tensorrt_llm.runtime is runtime
    assert tensorrt_llm.runtime.generation.SamplingConfig is runtime.SamplingConfig
    assert tensorrt_llm.logger is logger
    assert tensorrt_llm.__version__.startswith("0.10.0+trtllm.core.")
    install()
    assert sys.modules["tensorrt_llm"] is tensorrt_llm, "a second call does nothing"


def test_what_is_gone_says_so(named: None) -> None:
    with pytest.raises(ModuleNotFoundError, match="tensorrt_llm.models is not among what trtllm-core carries on"):
        __import__("tensorrt_llm.models")
    with pytest.raises(ImportError, match="tensorrt_llm.LLM is not carried on by trtllm-core: use trtllm_core"):
        exec("from tensorrt_llm import LLM", {})
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec("from tensorrt_llm import Nonsense", {})


def test_uninstall_takes_the_name_back() -> None:
    uninstall()
    install()
    uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'tensorrt_llm'"):
        __import__("tensorrt_llm.runtime")


def test_a_real_tensorrt_llm_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_llm.py").write_text("real = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):  # not imported yet, and imported
        with pytest.raises(ConfigError, match=r"is there already \(.*tensorrt_llm.py\)"):
            install()
        module = __import__("tensorrt_llm")
        assert module.real
    monkeypatch.delitem(sys.modules, "tensorrt_llm")


# -- CUDA on the CPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_cuda_means_the_cpu_while_it_lasts() -> None:
    with cuda_on_cpu():
        tensor = torch.zeros(2, device="cuda")
        assert {
            t.device.type for t in (tensor, tensor.cuda(), tensor.to("cuda:0"), tensor.to(torch.device("cuda")))
        } == {"cpu"}
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        torch.cuda.set_device(0)
        torch.cuda.current_stream().synchronize()
        assert torch.cuda.Stream().cuda_stream == 0
        assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
