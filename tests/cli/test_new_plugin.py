"""``trtllm-core new-plugin``: every kind of package builds, installs and passes its own tests."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtllm_core.cli.app import app
from trtllm_core.cli.new_plugin import SCAFFOLDS
from trtllm_core.plugin import HOOK_VERSIONS

each = pytest.mark.parametrize("kind", SCAFFOLDS)


def new(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["new-plugin", *map(str, arguments)])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each kind."""
    place = tmp_path_factory.mktemp("packages")
    for kind in SCAFFOLDS:
        done = new(kind, f"trial-{kind}", "--into", place)
        assert done.exit_code == 0, done.output
    return {kind: place / f"trtllm-plugin-trial-{kind}" for kind in SCAFFOLDS}


def test_there_is_one_for_each_kind_of_hook() -> None:
    assert {scaffold.kind for scaffold in SCAFFOLDS.values()} == set(HOOK_VERSIONS)


@each
def test_the_files(kind: str, packages: dict[str, Path]) -> None:
    directory = packages[kind]
    texts = {file.relative_to(directory).as_posix(): file.read_text("utf-8") for file in directory.rglob("*.*")}
    module = f"trial_{kind.replace('-', '_')}"
    package = f"src/trtllm_plugin_{module}"
    due = {"pyproject.toml", "README.md", f"{package}/plugin.py", f"{package}/py.typed", f"tests/test_{module}.py"}
    assert due <= texts.keys()
    for path, text in texts.items():
        assert "$" not in text, f"{path} has a word of its template left"
        assert max(map(len, text.splitlines()), default=0) <= 120
        if path.endswith(".py"):
            assert ast.get_docstring(ast.parse(text))
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["name"] == f"trtllm-plugin-trial-{kind}"
    assert "trtllm-core>=0.1,<0.2" in project["dependencies"]
    (target,) = project["entry-points"]["trtllm_core"].values()
    assert target.split(":")[0] == f"trtllm_plugin_{module}.plugin"
    assert f"pip install trtllm-plugin-trial-{kind}" in texts["README.md"]


def test_what_is_printed(tmp_path: Path) -> None:
    done = new("decoder", "trtllm-plugin-mine", "--into", tmp_path)
    assert (tmp_path / "trtllm-plugin-mine" / "pyproject.toml").is_file()
    assert f"cd {tmp_path / 'trtllm-plugin-mine'}" in "".join(done.output.split("\n"))
    assert "pip install -e" in done.output


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("sampler", "mine", "there is no kind of plugin 'sampler'; choose logits-processor"),
        ("decoder", "My_Plugin", "'My_Plugin' is no name"),
        ("decoder", "2nd", "is no name"),
        ("decoder", "a--b", "is no name"),
        ("decoder", "../up", "is no name"),
        ("decoder", "greedy", "there is a decoder 'greedy' already, of trtllm-core"),
        ("logits-processor", "min-p", "there is a logits processor 'min_p' already"),
        ("backend", "torch", "there is a backend 'torch' already"),
    ],
)
def test_what_is_refused(kind: str, name: str, message: str, tmp_path: Path) -> None:
    done = new(kind, name, "--into", tmp_path)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trtllm-plugin-mine").mkdir()
    (tmp_path / "trtllm-plugin-mine" / "mine.txt").write_text("mine")
    done = new("decoder", "mine", "--into", tmp_path)
    assert done.exit_code == 2
    assert "is there already" in " ".join(done.output.split())
    assert [file.name for file in (tmp_path / "trtllm-plugin-mine").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_all_of_them_build_install_and_pass_their_tests(packages: dict[str, Path], tmp_path: Path) -> None:
    """Wheels, unpacked where Python finds them with their entry points, and the tests of each package, in one run."""
    wheel = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels")
    subprocess.run([*map(str, wheel), *map(str, packages.values())], check=True)
    site = tmp_path / "site"
    for file in (tmp_path / "wheels").glob("*.whl"):
        zipfile.ZipFile(file).extractall(site)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    cuda: needs a CUDA GPU\n")
    # What the family's kit does beside, it does for every family; here it is about the skeleton.
    quick = "not dtypes and not tensor_parallel and not chunked"
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", tmp_path, "-k", quick)
    command = [sys.executable, "-m", "pytest", *options, *(package / "tests" for package in packages.values())]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    command = [sys.executable, "-m", "trtllm_core.cli", "plugins"]
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for kind in packages:
        assert f"trtllm-plugin-trial-{kind}" in listing.stdout
    assert "failed" not in listing.stdout
    command = [sys.executable, "-m", "trtllm_core.cli", "conform", "trtllm-plugin-trial-logits-processor"]
    conform = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert conform.returncode == 0, conform.stdout
