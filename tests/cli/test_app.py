"""The command as a whole: what it imports, how it fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.cli.app import app
from trtllm_core.version import __version__


@pytest.mark.parametrize("arguments", [["plugins"], ["--help"], ["run", "--help"], ["bench", "--help"]])
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom trtllm_core.cli import main\nsys.argv[1:] = " + repr(arguments) + "\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'transformers', 'tokenizers'} & sys.modules.keys()\n"
        "    assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_and_version(cli: Callable) -> None:
    help_text = cli("--help").stdout
    for command in ("build", "run", "bench", "plugins", "explain", "plan", "doctor"):
        assert command in help_text
    assert "default: 8" in " ".join(cli("build", "--help").stdout.replace("│", " ").split())
    assert cli("--version").stdout.strip() == __version__


@pytest.mark.parametrize("command", ["run", "explain", "bench", "plan"])
def test_a_missing_engine_is_one_sentence(command: str, cli: Callable, tmp_path: Path) -> None:
    result = cli(command, tmp_path / "none", *(["hello"] if command == "run" else []), status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_errors_print_no_markup_of_their_own(cli: Callable, tmp_path: Path) -> None:
    assert "[red]x[/red]" in cli("run", tmp_path / "[red]x[", "hello", "--set", "[red]x[/red]", status=2).stderr


def test_a_missing_file_is_a_mistake_of_the_user(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert (
        cli("run", tiny_engine, "--file", missing, status=2).stderr == f"error: {missing}: No such file or directory\n"
    )
    assert "Is a directory" in cli("run", tiny_engine, "--file", tmp_path, status=2).stderr


def test_the_unexpected_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    import trtllm_core.plugin

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(trtllm_core.plugin.Plugins, "load", broken)
    assert app.pretty_exceptions_enable is False
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("plugins")


def test_the_exit_status_of_a_process(shell: Callable, tmp_path: Path) -> None:
    done = shell("run", tmp_path / "none", "hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert shell("plugins").returncode == 0
    assert shell("run").returncode == 2
